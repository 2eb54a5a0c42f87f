package linux

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Flags of open(2) that package os does not have.
const (
	O_PATH      = unix.O_PATH
	O_TMPFILE   = unix.O_TMPFILE
	O_DIRECTORY = unix.O_DIRECTORY
	O_NOFOLLOW  = unix.O_NOFOLLOW
	O_NONBLOCK  = unix.O_NONBLOCK
)

// How openat2(2) resolves a path (RESOLVE_*).
const (
	// ResolveBeneath refuses a path that leaves the directory, and absolute links.
	ResolveBeneath = unix.RESOLVE_BENEATH
	// ResolveInRoot takes the directory for the root: absolute links and ".." stay in it.
	ResolveInRoot = unix.RESOLVE_IN_ROOT
	// ResolveNoSymlinks refuses every link on the path, magic ones included.
	ResolveNoSymlinks = unix.RESOLVE_NO_SYMLINKS
	// ResolveNoMagicLinks refuses links such as those in /proc/PID/fd.
	ResolveNoMagicLinks = unix.RESOLVE_NO_MAGICLINKS
	// ResolveNoXdev refuses a path that crosses a mount.
	ResolveNoXdev = unix.RESOLVE_NO_XDEV
)

// openTries is how often a lookup is tried (as in runc's and pathrs' wrappers).
const openTries = 128

// Open opens a path in a directory (openat2(2)).
//
// A lookup with [ResolveBeneath] or [ResolveInRoot] that meets ".." fails with EAGAIN while anything on the machine is renamed
// or mounted, and with EXDEV where that made the result look as if it lay outside of the directory. Open then tries again, 128
// times. An error that is still EAGAIN says that the path could not be looked up, not that it is absent or was replaced.
func Open(dir *os.File, path string, flags int, resolve uint64) (*os.File, error) {
	return OpenFile(dir, path, flags, 0, resolve)
}

// OpenFile is [Open] for flags that may create a file (os.O_CREATE), which then has this mode, less the umask.
func OpenFile(dir *os.File, path string, flags int, mode uint32, resolve uint64) (*os.File, error) {
	return openFile(dir, path, fullPath(dir, path), flags, mode, resolve)
}

// OpenAs is [Open] with another name for the handle: in a deep tree, a path would grow with the depth.
func OpenAs(dir *os.File, path, name string, flags int, resolve uint64) (*os.File, error) {
	return openFile(dir, path, name, flags, 0, resolve)
}

func openFile(dir *os.File, path, name string, flags int, mode uint32, resolve uint64) (*os.File, error) {
	how := unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Mode: uint64(mode), Resolve: resolve}
	return open("openat2", dir, path, name, func(fd int) (opened int, err error) {
		for range openTries {
			opened, err = unix.Openat2(fd, path, &how)
			if !mayPass(err, resolve) {
				break
			}
		}
		return opened, err
	})
}

// mayPass reports whether a lookup may succeed at another time: the kernel could not be sure because of a rename or mount
// elsewhere.
func mayPass(err error, resolve uint64) bool {
	return resolve&(unix.RESOLVE_BENEATH|unix.RESOLVE_IN_ROOT) != 0 && (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EXDEV))
}

// maxPath is what the kernel takes of a path at once (PATH_MAX), with the zero at its end.
const maxPath = unix.PathMax - 1

// OpenDirBeneath opens a directory beneath another one by a path of any length, without following a link ([O_PATH]). The handle of a
// longer path than the kernel takes at once has the beginning of the path for its name.
func OpenDirBeneath(dir *os.File, path string) (*os.File, error) {
	how := unix.OpenHow{Flags: O_PATH | O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	name := fullPath(dir, path[:min(len(path), maxPath)])
	for at := dir; ; {
		part := path
		if len(path) > maxPath {
			part = path[:strings.LastIndexByte(path[:maxPath], '/')+1]
		}
		next, err := open("openat2", at, part, name, func(fd int) (int, error) { return unix.Openat2(fd, part, &how) })
		if at != dir {
			at.Close()
		}
		if path = path[len(part):]; err != nil || path == "" {
			return next, err
		}
		at = next
	}
}

// OpenDir opens a directory to look up paths in it ([O_PATH]). The path may be a link to one.
func OpenDir(path string) (*os.File, error) { return Open(nil, path, O_PATH|O_DIRECTORY, 0) }

// OpenDirAt opens an entry of a directory that is a directory, and no link to one ([O_PATH]).
func OpenDirAt(dir *os.File, name string) (*os.File, error) {
	return Open(dir, name, O_PATH|O_DIRECTORY|O_NOFOLLOW, 0)
}

// ProcPath names an open file by a path that leads to this file whatever is renamed (proc_pid_fd(5)). It is valid in this process
// while the file is open.
func ProcPath(file *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", file.Fd()) }

// ProcessPath is [ProcPath] for child processes.
func ProcessPath(file *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd()) }

// CurrentPath returns the path that an open file has now (readlink(2) of [ProcPath]).
func CurrentPath(file *os.File) (string, error) { return os.Readlink(ProcPath(file)) }

// Reopen opens the file of a handle once more with other flags: one that was opened with [O_PATH] for reading, for instance,
// after it was found to be a regular file.
func Reopen(file *os.File, flags int) (*os.File, error) {
	return open("reopen", file, "", file.Name(), func(int) (int, error) {
		return unix.Openat(unix.AT_FDCWD, ProcPath(file), flags|unix.O_CLOEXEC, 0)
	})
}

// Dup returns another handle of the same open file (fcntl(2), F_DUPFD_CLOEXEC).
func Dup(file *os.File) (*os.File, error) {
	return open("dup", file, "", file.Name(), func(fd int) (int, error) {
		return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	})
}
