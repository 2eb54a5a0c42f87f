package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// neighbour takes what is free on a file system, as a pod can.
type neighbour struct {
	dir   string
	files int
	// bytes and inodes are set if it takes these.
	bytes, inodes bool
}

func newNeighbour(t *testing.T, fileSystem string, bytes, inodes bool) *neighbour {
	t.Helper()
	n := &neighbour{dir: filepath.Join(fileSystem, "neighbour"), bytes: bytes, inodes: inodes}
	must(t, os.Mkdir(n.dir, 0o700))
	must(t, n.fill())
	return n
}

// fill takes what is free.
func (n *neighbour) fill() error {
	if n.bytes {
		n.files++
		if err := drivertest.FillUp(filepath.Join(n.dir, fmt.Sprint("bytes-", n.files))); err != nil && !isFull(err) {
			return err
		}
	}
	for n.inodes {
		n.files++
		if err := os.WriteFile(filepath.Join(n.dir, fmt.Sprint(n.files)), nil, 0o600); isFull(err) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return nil
}

// keepFilling takes what becomes free, at any moment, until stop is called.
func (n *neighbour) keepFilling() (stop func() error) {
	ended, done := make(chan struct{}), make(chan error)
	go func() {
		for {
			select {
			case <-ended:
				done <- nil
				return
			default:
			}
			if err := n.fill(); err != nil {
				done <- err
				return
			}
		}
	}()
	return func() error { close(ended); return <-done }
}

// ballastRows are full disks. always is set if the neighbour takes what becomes free at any moment, and not only before each step.
var ballastRows = map[string]struct {
	fileSystem            string
	bytes, inodes, always bool
}{
	"ext4, bytes":                    {fileSystem: "ext4", bytes: true},
	"ext4, inodes":                   {fileSystem: "ext4", inodes: true},
	"ext4, bytes and inodes":         {fileSystem: "ext4", bytes: true, inodes: true},
	"ext4, bytes, always":            {fileSystem: "ext4", bytes: true, always: true},
	"ext4, bytes and inodes, always": {fileSystem: "ext4", bytes: true, inodes: true, always: true},
	"xfs, bytes":                     {fileSystem: "xfs", bytes: true},
	"xfs, bytes and inodes":          {fileSystem: "xfs", bytes: true, inodes: true},
	"xfs, bytes, always":             {fileSystem: "xfs", bytes: true, always: true},
	"xfs, bytes and inodes, always":  {fileSystem: "xfs", bytes: true, inodes: true, always: true},
	"btrfs, bytes":                   {fileSystem: "btrfs", bytes: true},
	"btrfs, bytes, always":           {fileSystem: "btrfs", bytes: true, always: true},
	"tmpfs, bytes and inodes":        {fileSystem: "tmpfs", bytes: true, inodes: true},
}

// TestBallast: volumes that exist can be published, unpublished, expanded and deleted on a disk that a neighbour has filled to the last
// byte and the last inode, and fills again, also after a crash of the driver.
func TestBallast(t *testing.T) {
	for name, row := range ballastRows {
		t.Run(name, func(t *testing.T) {
			node := newNode(t, "--reconcile-interval=100ms")
			mountDataRoot(t, node, row.fileSystem)
			start(t, node)
			layers := layersOf(t, node, map[string]string{"f": "f"})
			image := createSized(t, node, "image", readWriteOnce, 16<<20, "layers", layers, "sizeEnforcement", "image")
			sized := createSized(t, node, "sized", readWriteOnce, 8<<20, "layers", layers, "sizeEnforcement", "none")
			volumes := []drivertest.Volume{claim("static", readWriteOnce, "layers", layers), sized, image}
			for _, v := range volumes {
				pod := newPod(t, node, "first-"+v.ID)
				write(t, filepath.Join(publish(t, pod, v), "f"), "kept")
				unpublish(t, pod, v)
			}
			full := wholeFiles(t, node)
			if full == 0 {
				t.Fatal("there is no ballast")
			}

			other := newNeighbour(t, node.DataRoot, row.bytes, row.inodes)
			fillAgain := func() { must(t, other.fill()) }
			stop, rounds := func() error { return nil }, 6
			if row.always {
				// A disk as small as this one has a small ballast, and the neighbour takes the most of what it gives up: a third round used it
				// up in one of eight runs on xfs.
				stop, fillAgain, rounds = other.keepFilling(), func() {}, 2
			}
			for round := range rounds {
				for i, v := range volumes {
					pod := newPod(t, node, fmt.Sprint("pod-", round, "-", v.ID))
					fillAgain()
					target := publish(t, pod, v)
					wantFile(t, filepath.Join(target, "f"), "kept")
					wantWritable(t, target)
					if round == i {
						fillAgain()
						must(t, node.Kill())
						start(t, node)
					}
					fillAgain()
					if v.ID == sized.ID {
						must(t, expand(t, node, pod, v, int64(9+round)<<20, 0))
						fillAgain()
					}
					unpublish(t, pod, v)
					removePod(t, pod)
				}
				t.Logf("%d of %d files of the ballast are left", wholeFiles(t, node), full)
			}
			for _, v := range []drivertest.Volume{sized, image} {
				fillAgain()
				deleteVolume(t, node, v)
				wantAbsent(t, filepath.Join(node.DataRoot, "volumes", v.ID))
			}
			must(t, stop())
			must(t, os.RemoveAll(other.dir))
			eventually(t, "the ballast is full again", func() bool { return wholeFiles(t, node) == full })
		})
	}
}

// mountDataRoot has a file system of its own for the data root, of the smallest size that will do.
func mountDataRoot(t *testing.T, node *drivertest.Node, fileSystem string) {
	t.Helper()
	switch fileSystem {
	case "tmpfs":
		must(t, os.MkdirAll(node.DataRoot, 0o755))
		must(t, unix.Mount("tmpfs", node.DataRoot, "tmpfs", 0, "size=96m,nr_inodes=4096"))
		t.Cleanup(func() { _ = unix.Unmount(node.DataRoot, unix.MNT_DETACH) })
	case "ext4":
		mountImage(t, fileSystem, 128<<20, node.DataRoot, "")
	default:
		mountImage(t, fileSystem, 320<<20, node.DataRoot, "")
	}
}

// wholeFiles returns how many files of the ballast have all of their blocks.
func wholeFiles(t *testing.T, node *drivertest.Node) (count int) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(node.DataRoot, "ballast", "*"))
	must(t, err)
	for _, path := range paths {
		var stat unix.Stat_t
		if err := unix.Lstat(path, &stat); err == nil && stat.Blocks*512 >= 64<<10 {
			count++
		}
	}
	return count
}

// wantWritable checks that a view was not mounted read-only, as the kernel does where it cannot make what it needs.
func wantWritable(t *testing.T, target string) {
	t.Helper()
	var stat unix.Statfs_t
	must(t, unix.Statfs(target, &stat))
	if stat.Flags&unix.ST_RDONLY != 0 {
		t.Errorf("the view at %s is read-only", target)
	}
}
