package integration

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// TestOverlaySemantics is what programs do to files, on a view whose upper already holds half of them.
func TestOverlaySemantics(t *testing.T) {
	tests := map[string]func(t *testing.T, view, layer, upper string){
		"copy-up keeps owner, mode, times and xattrs": copyUp,
		"whiteout":                           whiteout,
		"opaque directory":                   opaqueDirectory,
		"rename of a directory from a layer": renameDirectory,
		"hard links":                         hardLinks,
		"xattrs":                             xattrs,
		"O_TMPFILE":                          tmpfile,
		"mmap":                               mmap,
		"inode numbers stay over a copy-up":  inodeNumbers,
		"a file opened before its copy-up":   openedBeforeCopyUp,
		"no file handles":                    noFileHandles,
		"copy_file_range":                    copyFileRange,
		"no upper on a view":                 noUpperOnAView,
	}
	// One driver for all: to start it takes longer than they do, in the virtual machine of test/kernel by far.
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		for name, test := range tests {
			t.Run(name, func(t *testing.T) {
				v := inline("layers", layersOf(t, node, map[string]string{"f": "layer", "dir/a": "a", "dir/sub/b": "b"}))
				pod := newPod(t, node, "pod")
				layer := filepath.Join(node.LayerDir, "layer-0")
				must(t, unix.Setxattr(filepath.Join(layer, "f"), "user.origin", []byte("layer"), 0))
				must(t, os.Chown(filepath.Join(layer, "f"), 1234, 5678))
				must(t, os.Chmod(filepath.Join(layer, "f"), 0o640))
				target := publish(t, pod, v)
				// Also after a test that is skipped, because the kernel lacks what it is about: the next one has the same node.
				defer func() {
					unpublish(t, pod, v)
					removePod(t, pod)
					wantFile(t, filepath.Join(layer, "f"), "layer")
					wantFile(t, filepath.Join(layer, "dir/sub/b"), "b")
					wantNothingLeft(t, node)
				}()
				test(t, target, layer, upperDir(node, pod, v))
			})
		}
	})
}

func copyUp(t *testing.T, view, layer, upper string) {
	wantAbsent(t, filepath.Join(upper, "f"))
	var before, after unix.Stat_t
	must(t, unix.Stat(filepath.Join(layer, "f"), &before))
	file, err := os.OpenFile(filepath.Join(view, "f"), os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	must(t, unix.Stat(filepath.Join(upper, "f"), &after))
	if before.Mode != after.Mode || before.Uid != after.Uid || before.Gid != after.Gid || before.Mtim != after.Mtim {
		t.Errorf("copied up as %+v from %+v", after, before)
	}
	_, err = file.WriteString("+pod")
	must(t, err)
	must(t, file.Close())
	wantFile(t, filepath.Join(view, "f"), "layer+pod")
	wantFile(t, filepath.Join(upper, "f"), "layer+pod")
	wantXattr(t, filepath.Join(upper, "f"), "user.origin", "layer")
}

func whiteout(t *testing.T, view, _, upper string) {
	must(t, os.Remove(filepath.Join(view, "f")))
	wantAbsent(t, filepath.Join(view, "f"))
	var stat unix.Stat_t
	must(t, unix.Lstat(filepath.Join(upper, "f"), &stat))
	if stat.Mode&unix.S_IFMT != unix.S_IFCHR || stat.Rdev != 0 {
		t.Errorf("no whiteout: mode %o, device %d", stat.Mode, stat.Rdev)
	}
	write(t, filepath.Join(view, "f"), "new")
	wantFile(t, filepath.Join(view, "f"), "new")
}

func opaqueDirectory(t *testing.T, view, _, upper string) {
	must(t, os.RemoveAll(filepath.Join(view, "dir")))
	must(t, os.Mkdir(filepath.Join(view, "dir"), 0o755))
	entries, err := os.ReadDir(filepath.Join(view, "dir"))
	must(t, err)
	if len(entries) != 0 {
		t.Errorf("the layer's files shine through: %v", entries)
	}
	wantXattr(t, filepath.Join(upper, "dir"), "trusted.overlay.opaque", "y")
}

func renameDirectory(t *testing.T, view, _, _ string) {
	// No EXDEV: rename(2) itself works, and not only programs that copy where it does not.
	must(t, os.Rename(filepath.Join(view, "dir"), filepath.Join(view, "moved")))
	wantFile(t, filepath.Join(view, "moved/sub/b"), "b")
	wantAbsent(t, filepath.Join(view, "dir"))
	must(t, os.Rename(filepath.Join(view, "moved/sub"), filepath.Join(view, "sub")))
	wantFile(t, filepath.Join(view, "sub/b"), "b")
}

func hardLinks(t *testing.T, view, _, _ string) {
	must(t, os.Link(filepath.Join(view, "f"), filepath.Join(view, "link")))
	write(t, filepath.Join(view, "link"), "through the link")
	wantFile(t, filepath.Join(view, "f"), "through the link")
	// The file belongs to another user, and that does not change.
	var stat unix.Stat_t
	must(t, unix.Stat(filepath.Join(view, "f"), &stat))
	if stat.Nlink != 2 || stat.Uid != 1234 {
		t.Errorf("%d links, owner %d", stat.Nlink, stat.Uid)
	}
}

func xattrs(t *testing.T, view, layer, _ string) {
	path := filepath.Join(view, "f")
	wantXattr(t, path, "user.origin", "layer")
	must(t, unix.Setxattr(path, "user.origin", []byte("pod"), 0))
	must(t, unix.Setxattr(path, "trusted.mine", []byte("1"), 0))
	wantXattr(t, path, "user.origin", "pod")
	wantXattr(t, path, "trusted.mine", "1")
	wantXattr(t, filepath.Join(layer, "f"), "user.origin", "layer")
	must(t, unix.Removexattr(path, "user.origin"))
	if _, err := unix.Getxattr(path, "user.origin", nil); !isErrno(err, unix.ENODATA) {
		t.Errorf("a removed attribute: %v", err)
	}
}

func tmpfile(t *testing.T, view, _, _ string) {
	fd, err := unix.Open(filepath.Join(view, "dir"), unix.O_TMPFILE|unix.O_RDWR, 0o600)
	if isErrno(err, unix.EOPNOTSUPP) && !kernelAtLeast(t, 6, 3) {
		t.Skip("overlayfs has O_TMPFILE from Linux 6.3 on")
	}
	must(t, err)
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte("no name"))
	must(t, err)
	must(t, unix.Linkat(unix.AT_FDCWD, procFD(fd), unix.AT_FDCWD, filepath.Join(view, "dir/named"), unix.AT_SYMLINK_FOLLOW))
	wantFile(t, filepath.Join(view, "dir/named"), "no name")
}

func mmap(t *testing.T, view, layer, _ string) {
	file, err := os.OpenFile(filepath.Join(view, "f"), os.O_RDWR, 0)
	must(t, err)
	defer file.Close()
	memory, err := unix.Mmap(int(file.Fd()), 0, 5, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	copy(memory, "MMAP!")
	must(t, unix.Msync(memory, unix.MS_SYNC))
	must(t, unix.Munmap(memory))
	wantFile(t, filepath.Join(view, "f"), "MMAP!")
	wantFile(t, filepath.Join(layer, "f"), "layer")
}

func inodeNumbers(t *testing.T, view, _, _ string) {
	var before, after unix.Stat_t
	must(t, unix.Stat(filepath.Join(view, "dir/a"), &before))
	write(t, filepath.Join(view, "dir/a"), "copied up")
	must(t, unix.Stat(filepath.Join(view, "dir/a"), &after))
	if before.Ino != after.Ino || before.Dev != after.Dev {
		t.Errorf("inode %d on device %d became %d on %d", before.Ino, before.Dev, after.Ino, after.Dev)
	}
}

func openedBeforeCopyUp(t *testing.T, view, _, _ string) {
	file, err := os.Open(filepath.Join(view, "f"))
	must(t, err)
	defer file.Close()
	mapped := func(file *os.File) string {
		memory, err := unix.Mmap(int(file.Fd()), 0, len("layer"), unix.PROT_READ, unix.MAP_SHARED)
		must(t, err)
		defer unix.Munmap(memory)
		return string(memory)
	}
	memory, err := unix.Mmap(int(file.Fd()), 0, len("layer"), unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	defer unix.Munmap(memory)
	write(t, filepath.Join(view, "f"), "later")
	read := make([]byte, len("later"))
	_, err = file.ReadAt(read, 0)
	must(t, err)
	again, err := os.Open(filepath.Join(view, "f"))
	must(t, err)
	defer again.Close()
	for what, values := range map[string][2]string{
		"read(2)":                  {string(read), "later"},
		"mmap before the copy-up":  {string(memory), "layer"},
		"mmap after the copy-up":   {mapped(file), "layer"},
		"mmap of the file, opened": {mapped(again), "later"},
	} {
		if values[0] != values[1] {
			t.Errorf("%s shows %q, not %q", what, values[0], values[1])
		}
	}
}

func noFileHandles(t *testing.T, view, _, _ string) {
	write(t, filepath.Join(view, "new"), "pod")
	for _, name := range []string{"f", "new", "dir"} {
		if _, _, err := unix.NameToHandleAt(unix.AT_FDCWD, filepath.Join(view, name), 0); !isErrno(err, unix.EOPNOTSUPP) {
			t.Errorf("name_to_handle_at of %s: %v; want EOPNOTSUPP", name, err)
		}
	}
	byID, err := unix.FanotifyInit(unix.FAN_CLOEXEC|unix.FAN_REPORT_FID, unix.O_RDONLY)
	must(t, err)
	defer unix.Close(byID)
	err = unix.FanotifyMark(byID, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_MODIFY, unix.AT_FDCWD, view)
	if !isErrno(err, unix.EOPNOTSUPP) {
		t.Errorf("fanotify by file ID, the whole view: %v; want EOPNOTSUPP", err)
	}
	byDescriptor, err := unix.FanotifyInit(unix.FAN_CLOEXEC, unix.O_RDONLY)
	must(t, err)
	defer unix.Close(byDescriptor)
	must(t, unix.FanotifyMark(byDescriptor, unix.FAN_MARK_ADD|unix.FAN_MARK_MOUNT, unix.FAN_MODIFY, unix.AT_FDCWD, view))
	must(t, os.Remove(filepath.Join(view, "new")))
}

func copyFileRange(t *testing.T, view, layer, _ string) {
	copied := func(from, to string) error {
		in, err := os.Open(from)
		must(t, err)
		defer in.Close()
		out, err := os.Create(to)
		must(t, err)
		defer out.Close()
		_, err = unix.CopyFileRange(int(in.Fd()), nil, int(out.Fd()), nil, len("layer"), 0)
		return err
	}
	// The layer lies on the file system of the upper.
	outside := filepath.Join(filepath.Dir(layer), "outside")
	defer os.Remove(outside)
	if err := copied(filepath.Join(view, "f"), outside); !isErrno(err, unix.EXDEV) {
		t.Errorf("out of the view: %v; want EXDEV", err)
	}
	if err := copied(filepath.Join(layer, "f"), filepath.Join(view, "in")); !isErrno(err, unix.EXDEV) {
		t.Errorf("into the view: %v; want EXDEV", err)
	}
	must(t, copied(filepath.Join(view, "f"), filepath.Join(view, "within")))
	wantFile(t, filepath.Join(view, "within"), "layer")
}

func noUpperOnAView(t *testing.T, view, layer, _ string) {
	upper, work, target := filepath.Join(view, "upper"), filepath.Join(view, "work"), t.TempDir()
	must(t, os.Mkdir(upper, 0o755))
	must(t, os.Mkdir(work, 0o755))
	err := unix.Mount("overlay", target, "overlay", 0, "lowerdir="+layer+",upperdir="+upper+",workdir="+work)
	if !isErrno(err, unix.EINVAL) {
		t.Errorf("an overlay with its upper on a view: %v; want EINVAL", err)
	}
	if err == nil {
		must(t, unix.Unmount(target, 0))
	}
}
