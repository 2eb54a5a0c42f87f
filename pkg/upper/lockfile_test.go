package upper_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// prepareWithLockFile prepares an upper in another volume where the pod made the lock file.
func prepareWithLockFile(t *testing.T, plant func(path string) error) error {
	t.Helper()
	volume := mountAt(t, "tmpfs")
	path := filepath.Join(volume, "up", "overlay-csi.json")
	if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := plant(path); err != nil {
		t.Fatal(err)
	}
	me := upper.LockHolder{Node: "n", BootID: "b", VolumeID: "v", Target: "/t"}
	dirs, err := podVolume(t, upper.PodVolumePath{Volume: volume, Path: "up"}, me, true).Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
	if err == nil {
		dirs.Close()
	}
	return err
}

// TestLockFileIsLookedAtBeforeItIsOpened has the pod plant what must not be opened. There is no device of the number: opening it
// answers ENXIO, after the kernel looked for a module.
func TestLockFileIsLookedAtBeforeItIsOpened(t *testing.T) {
	for name, plant := range map[string]func(path string) error{
		"device": func(path string) error { return linux.Mknodat(nil, path, syscall.S_IFCHR|0o600, linux.Mkdev(511, 7)) },
		"socket": func(path string) error { return linux.Mknodat(nil, path, syscall.S_IFSOCK|0o600, 0) },
		"FIFO":   func(path string) error { return linux.Mknodat(nil, path, syscall.S_IFIFO|0o600, 0) },
		"link":   func(path string) error { return os.Symlink("/dev/null", path) },
	} {
		t.Run(name, func(t *testing.T) {
			err := prepareWithLockFile(t, plant)
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "not a regular file") {
				t.Errorf("Prepare: %v, want FailedPrecondition", err)
			}
			if err != nil && strings.Contains(err.Error(), "%!") {
				t.Errorf("a broken message: %v", err)
			}
		})
	}
}

// TestMessagesOfALockFileAreBounded has the pod write a lock file of megabytes, whose parts stand in messages.
func TestMessagesOfALockFileAreBounded(t *testing.T) {
	const maxMessage = 4 << 10
	huge := strings.Repeat("\x01", 1<<18)
	lockFile := func(layers []string, holder upper.LockHolder) []byte {
		data, err := json.Marshal(map[string]any{"layers": layers, "holder": holder})
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	for name, content := range map[string][]byte{
		"many layers": lockFile(strings.Split(strings.Repeat("oci://registry/repository,", 1<<17), ","), upper.LockHolder{}),
		"long layers": lockFile([]string{huge, huge, huge, huge}, upper.LockHolder{}),
		"long holder": lockFile([]string{"dir://m/a"}, upper.LockHolder{Node: "n", BootID: "b", VolumeID: huge, Target: huge}),
		"long number": []byte(`{"layers": ` + strings.Repeat("1", 1<<20) + `}`),
		"long key":    []byte(`{"layers": [1], "` + huge + `": 1}`),
	} {
		t.Run(name, func(t *testing.T) {
			err := prepareWithLockFile(t, func(path string) error { return os.WriteFile(path, content, 0o600) })
			if !errdefs.IsFailedPrecondition(err) {
				t.Fatalf("Prepare: %.200v, want FailedPrecondition", err)
			}
			if len(err.Error()) > maxMessage {
				t.Errorf("a message of %d bytes", len(err.Error()))
			}
		})
	}
}

// TestNobodyWaitsForAFlockWithoutEnd has a process of the pod keep the lock of the directory. The undo of a publish that has failed
// has no deadline, and holds the volume.
func TestNobodyWaitsForAFlockWithoutEnd(t *testing.T) {
	at := upper.PodVolumePath{Volume: mountAt(t, "tmpfs"), Path: "up"}
	me := upper.LockHolder{Node: "n", BootID: "b", VolumeID: "v", Target: "/t"}
	used := podVolume(t, at, me, true)
	prepare := func() error {
		dirs, err := used.Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
		if err == nil {
			dirs.Close()
		}
		return err
	}
	if err := prepare(); err != nil {
		t.Fatal(err)
	}
	pod := open(t, filepath.Join(at.Volume, at.Path))
	if err := linux.Flock(pod); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		_, err := used.Prepare(ctx, upper.RootAttr{Mode: 0o755})
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
			t.Errorf("Prepare while process %d has the lock: %v", os.Getpid(), err)
		}
		// The pod must be able to end. The lock that stays is stale.
		if err := used.Release(ctx); err != nil {
			t.Errorf("Release while process %d has the lock: %v", os.Getpid(), err)
		}
	})
	pod.Close()
	if err := errors.Join(prepare(), used.Release(t.Context())); err != nil {
		t.Errorf("after the process of the pod: %v", err)
	}
}
