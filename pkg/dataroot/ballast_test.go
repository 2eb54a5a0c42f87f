package dataroot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// newBallast mounts a file system of 64 MiB, and returns a ballast on it.
func newBallast(t *testing.T) (b *Ballast, root string) {
	t.Helper()
	needs.Root(t)
	root = t.TempDir()
	must(t, unix.Mount("tmpfs", root, "tmpfs", 0, "size=64m,nr_inodes=4096"))
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	return reopenBallast(t, root), root
}

func reopenBallast(t *testing.T, root string) *Ballast {
	t.Helper()
	b, err := openBallast(filepath.Join(root, BallastDir))
	must(t, err)
	t.Cleanup(func() { b.Close() })
	return b
}

func wantMissing(t *testing.T, b *Ballast, want int) {
	t.Helper()
	must(t, b.Fill())
	if missing, wanted := b.Missing(); missing != want || wanted != 16 {
		t.Errorf("%d of %d files are missing, want %d of 16", missing, wanted, want)
	}
}

// TestBallastIsMadeWhole: files that a crash left without their blocks get them.
func TestBallastIsMadeWhole(t *testing.T) {
	b, root := newBallast(t)
	wantMissing(t, b, 0)
	must(t, os.Truncate(filepath.Join(root, BallastDir, "3"), 0))
	must(t, os.Truncate(filepath.Join(root, BallastDir, "4"), 1))
	must(t, os.Remove(filepath.Join(root, BallastDir, "5")))
	b = reopenBallast(t, root)
	wantMissing(t, b, 0)
	entries, err := os.ReadDir(filepath.Join(root, BallastDir))
	must(t, err)
	if len(entries) != 16 {
		t.Errorf("%d files", len(entries))
	}
}

// TestReplaceFileOnAFullDisk: a record is written as often as one likes, and a small one uses nothing up.
func TestReplaceFileOnAFullDisk(t *testing.T) {
	b, root := newBallast(t)
	dir, err := linux.OpenDir(root)
	must(t, err)
	defer dir.Close()
	must(t, b.ReplaceFile(dir, "record", []byte("0"), true))
	wantMissing(t, b, 0)
	must(t, drivertest.FillUp(filepath.Join(root, "filler")))
	for _, text := range []string{"1", strings.Repeat("2", 4000), "", strings.Repeat("3", 60000), "4"} {
		for range 40 {
			must(t, b.ReplaceFile(dir, "record", []byte(text), true))
			if got, err := os.ReadFile(filepath.Join(root, "record")); err != nil || string(got) != text {
				t.Fatalf("%d bytes, want %d: %v", len(got), len(text), err)
			}
		}
		if missing, _ := b.Missing(); missing > 0 && len(text) <= 4000 && text != "4" {
			t.Errorf("%d files were used up for %d bytes", missing, len(text))
		}
	}
	must(t, os.Remove(filepath.Join(root, "filler")))
	wantMissing(t, b, 0)
}

// TestReplacedFileIsNotOverwritten: what a record was written over is used again once the disk knows the new one. A power cut would
// bring back a name for it.
func TestReplacedFileIsNotOverwritten(t *testing.T) {
	needs.Root(t)
	image, root := filepath.Join(t.TempDir(), "image"), t.TempDir()
	if err := errors.Join(drivertest.MakeImage("ext4", image, 64<<20, ""), drivertest.MountImage("ext4", image, root)); err != nil {
		t.Skipf("no ext4 here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	b := reopenBallast(t, root)
	dir, err := linux.OpenDir(root)
	must(t, err)
	defer dir.Close()
	for _, name := range []string{"a", "b"} {
		must(t, b.ReplaceFile(dir, name, []byte("old "+name), true))
	}
	must(t, b.Fill())
	must(t, drivertest.FillUp(filepath.Join(root, "filler")))
	must(t, linux.SyncDir(dir))
	must(t, b.ReplaceFile(dir, "a", []byte("new a"), true))
	// What the next record does to the blocks of one of them, up to a power cut before that file is synced.
	spares, err := os.ReadDir(filepath.Join(root, BallastDir))
	must(t, err)
	for _, spare := range spares {
		file, err := os.OpenFile(filepath.Join(root, BallastDir, spare.Name()), os.O_WRONLY, 0)
		must(t, err)
		_, err = file.WriteString("new b")
		must(t, err)
		must(t, unix.SyncFileRange(int(file.Fd()), 0, 5,
			unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER))
		must(t, file.Close())
	}
	must(t, drivertest.ShutDown(root))
	must(t, errors.Join(b.Close(), dir.Close(), unix.Unmount(root, unix.MNT_DETACH)))
	must(t, drivertest.MountImage("ext4", image, root))
	got, err := os.ReadFile(filepath.Join(root, "a"))
	if err != nil || string(got) != "old a" && string(got) != "new a" {
		t.Errorf("after a power cut the record of a is %q, %v", got, err)
	}
}

// TestReplaceLargeFileOnAFullDisk: records of more than one file of the ballast, beside a neighbour that takes whatever becomes free. What
// cannot be written beside such a neighbour leaves the record before.
func TestReplaceLargeFileOnAFullDisk(t *testing.T) {
	for _, greedy := range []bool{false, true} {
		for _, size := range []int{100 << 10, 300 << 10, 600 << 10} {
			t.Run(fmt.Sprintf("%d KiB, neighbour: %v", size>>10, greedy), func(t *testing.T) {
				b, root := newBallast(t)
				dir, err := linux.OpenDir(root)
				must(t, err)
				defer dir.Close()
				record := func(i int) string { return strings.Repeat(strconv.Itoa(i%10), size) }
				must(t, b.ReplaceFile(dir, "record", []byte(record(0)), true))
				wantMissing(t, b, 0)
				must(t, drivertest.FillUp(filepath.Join(root, "filler")))
				if greedy {
					file, err := os.OpenFile(filepath.Join(root, "filler"), os.O_WRONLY|os.O_APPEND, 0)
					must(t, err)
					done := make(chan struct{})
					var group sync.WaitGroup
					group.Go(func() {
						defer file.Close()
						for {
							select {
							case <-done:
								return
							default:
								_, _ = file.Write(make([]byte, 4096))
							}
						}
					})
					defer group.Wait()
					defer close(done)
				}
				failed := 0
				last := record(0)
				for i := range 40 {
					if err := b.ReplaceFile(dir, "record", []byte(record(i)), true); err != nil {
						failed++
					} else {
						last = record(i)
					}
					if got, err := os.ReadFile(filepath.Join(root, "record")); err != nil || string(got) != last {
						t.Fatalf("%d bytes, want %d: %v", len(got), len(last), err)
					}
				}
				missing, _ := b.Missing()
				t.Logf("%d of 40 failed, %d files are missing", failed, missing)
				if failed > 0 && !greedy {
					t.Errorf("%d of 40 records could not be written", failed)
				}
			})
		}
	}
}
