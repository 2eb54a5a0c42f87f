package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// TestRecordsAreReadOnce: to ask for the capacity or to make a volume reads no other volume's record. Each of many claims would read
// those of all others.
func TestRecordsAreReadOnce(t *testing.T) {
	n := newFakeNode(t)
	claim := func(name string) {
		_, err := n.manager.Create(t.Context(), CreateRequest{Name: name, Spec: parsed(t, rwo, spec.KeySizeLimit, "8Mi"), Access: rwo.Access})
		check(t, err)
	}
	for _, name := range []string{"a", "b", "c"} {
		claim(name)
	}
	_, err := n.manager.Capacity(t.Context())
	check(t, err)
	opened := opens(t, n.records.Dir("a"), n.records.Dir("b"), n.records.Dir("c"))
	_, err = n.manager.Capacity(t.Context())
	check(t, err)
	claim("d")
	if count := opened(); count > 0 {
		t.Errorf("the records of 3 other volumes were opened %d times", count)
	}
}

// opens returns a function that says how often files in directories have been opened.
func opens(t *testing.T, dirs ...string) func() int {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	for _, dir := range dirs {
		_, err := unix.InotifyAddWatch(fd, dir, unix.IN_OPEN)
		check(t, err)
	}
	return func() int {
		buffer := make([]byte, 64<<10)
		n, err := unix.Read(fd, buffer)
		if errors.Is(err, unix.EAGAIN) {
			return 0
		}
		check(t, err)
		return strings.Count(string(buffer[:n]), dataroot.Record)
	}
}

// TestReservationsFollowTheRecords compares what is reserved in memory with what a new process reads, after each operation.
func TestReservationsFollowTheRecords(t *testing.T) {
	n := newFakeNode(t)
	_, err := n.manager.Capacity(t.Context())
	check(t, err)
	step := func(name string, do func()) {
		t.Helper()
		do()
		fresh := newReservations(n.manager.config, n.manager.uppers)
		check(t, fresh.load())
		now := n.manager.ledger
		if got, want := fmt.Sprint(now.reserved, bytesOf(now.volumes)), fmt.Sprint(fresh.reserved, bytesOf(fresh.volumes)); got != want {
			t.Errorf("%s: %s is reserved, and by the records %s", name, got, want)
		}
	}
	var req PublishRequest
	path := filepath.Join(n.records.Dir("v"), dataroot.Record)
	step("claim published", func() { req = n.sized() })
	step("expanded", func() { wantExpanded(t, n, req, 128*mib) })
	step("record cannot be written", func() {
		check(t, os.Mkdir(path+".new", 0o700))
		check(t, os.Mkdir(path+".new/x", 0o700))
		if _, err := n.manager.Expand(t.Context(), "v", req.Target, 256*mib, 0); err == nil {
			t.Error("expanded without a record")
		}
		check(t, os.RemoveAll(path+".new"))
	})
	step("removed by a person", func() {
		check(t, os.Rename(n.records.Dir("v"), n.dir+"/moved"))
		n.manager.reconcile(t.Context())
	})
	step("restored by a person", func() {
		check(t, os.Rename(n.dir+"/moved", n.records.Dir("v")))
		n.manager.reconcile(t.Context())
	})
	if n.manager.ledger.reserved != 128*mib {
		t.Errorf("%d bytes are reserved, want 128 MiB", n.manager.ledger.reserved)
	}
	step("unpublished", func() { check(t, n.manager.Unpublish(t.Context(), "v", req.Target)) })
	step("deleted", func() { check(t, n.manager.Delete(t.Context(), "v")) })
	step("inline published", func() { req = n.publish(n.request("p1", inline, spec.KeySizeLimit, "8Mi")) })
	step("inline unpublished", func() { check(t, n.manager.Unpublish(t.Context(), req.VolumeID, req.Target)) })
	if n.manager.ledger.reserved != 0 {
		t.Errorf("%d bytes are reserved of nothing", n.manager.ledger.reserved)
	}
	step("publish fails", func() {
		n.fail["overlay"] = errForced
		if err := n.manager.Publish(t.Context(), n.request("p2", inline, spec.KeySizeLimit, "8Mi")); err == nil {
			t.Error("published")
		}
	})
}

func bytesOf(volumes map[string]*reservation) map[string]int64 {
	all := map[string]int64{}
	for id, r := range volumes {
		all[id] = r.bytes()
	}
	return all
}

// TestManyVolumesAreMeasuredSeldom: what many volumes take of the disk is measured for a part of the time only, and what is deleted
// meanwhile is not counted as free and as theirs.
func TestManyVolumesAreMeasuredSeldom(t *testing.T) {
	needs.Root(t)
	n := newFakeNode(t)
	check(t, unix.Mount("tmpfs", fakeRoot{n}.Path(), "tmpfs", 0, "size=1g"))
	t.Cleanup(func() { _ = unix.Unmount(fakeRoot{n}.Path(), unix.MNT_DETACH) })
	check(t, os.Mkdir(fakeRoot{n}.VolumesDir(), 0o700))
	for i := range manyVolumes {
		r := &record.Record{ID: fmt.Sprint("v", i), Spec: parsed(t, inline, spec.KeySizeLimit, "1Mi"), Inline: true, Size: mib}
		check(t, n.records.Save(r.With(record.Publication{Target: n.target(r.ID)})))
	}
	file := filepath.Join(fakeRoot{n}.Path(), "taken")
	check(t, os.WriteFile(file, make([]byte, 64*mib), 0o600))
	count, each := 0, int64(64*mib/manyVolumes)
	n.onDiskUsage = func() int64 { count++; return each }
	first, err := n.manager.Capacity(t.Context())
	check(t, err)
	n.manager.ledger.valid = n.manager.ledger.valid.AddDate(1, 0, 0)
	check(t, os.Remove(file))
	each = 0
	later, err := n.manager.Capacity(t.Context())
	check(t, err)
	if count != manyVolumes || later > first {
		t.Errorf("%d uppers were measured, want %d once; capacity %d, and %d after a pod has deleted something", count, manyVolumes, first, later)
	}
	check(t, os.WriteFile(file, make([]byte, 64*mib), 0o600))
	check(t, os.Remove(file))
	exact, err := n.manager.ledger.available(t.Context(), true)
	check(t, err)
	if count != 2*manyVolumes || exact < first {
		t.Errorf("%d uppers were measured, want %d twice; capacity %d, and exactly %d", count, manyVolumes, first, exact)
	}
}
