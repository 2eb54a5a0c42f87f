package linux

import (
	"errors"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// NewBareNamespace returns a mount namespace with the root mount of this one, /proc and /dev, and nothing else of what is mounted
// (mount_namespaces(7)). What is mounted later in one of the two is not mounted in the other, and the namespace keeps nothing mounted
// but these. It ends when the file is closed and no process is in it.
func NewBareNamespace() (*os.File, error) {
	mounts := map[string]*os.File{"/": nil, "/proc": nil, "/dev": nil}
	defer func() {
		for _, mount := range mounts {
			if mount != nil {
				mount.Close()
			}
		}
	}()
	for path := range mounts {
		mount, err := OpenTree(nil, path)
		if err != nil {
			return nil, err
		}
		mounts[path] = mount
		// What is mounted on it is not mounted on the one that it is a copy of.
		if err := MountSetattr(mount, MountChange{Private: true}); err != nil {
			return nil, err
		}
	}
	var namespace *os.File
	err := onThread(func() (err error) {
		if err = os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNS)); err != nil {
			return err
		}
		if err := pivotTo(mounts["/"]); err != nil {
			return err
		}
		for _, path := range []string{"/proc", "/dev"} {
			target, err := OpenDir(path)
			if err != nil {
				return err
			}
			err = MoveMount(mounts[path], target)
			target.Close()
			if err != nil {
				return err
			}
		}
		namespace, err = Open(nil, "/proc/thread-self/ns/mnt", os.O_RDONLY, 0)
		return err
	})
	return namespace, err
}

// pivotTo makes a detached mount the root of the mount namespace of this thread, in which nothing else is mounted then.
func pivotTo(root *os.File) error {
	// Nothing that is done here is done in the namespace that this one is a copy of.
	if err := Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	old, err := OpenDir("/")
	if err != nil {
		return err
	}
	defer old.Close()
	if err := MoveMount(root, old); err != nil {
		return err
	}
	if err := root.Chdir(); err != nil {
		return err
	}
	// The old root is mounted on the new one then.
	if err := os.NewSyscallError("pivot_root", unix.PivotRoot(".", ".")); err != nil {
		return err
	}
	if err := old.Chdir(); err != nil {
		return err
	}
	return errors.Join(unmount(".", unix.MNT_DETACH), root.Chdir())
}

// InMountNamespace calls do on a thread whose mount namespace and working directory are these. Processes that do starts have them too.
// Others are not affected, and the thread ends with do.
func InMountNamespace(namespace, dir *os.File, do func() error) error {
	return onThread(func() error {
		if err := os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_FS)); err != nil {
			return err
		}
		if err := call("setns", namespace, func(fd int) error { return unix.Setns(fd, unix.CLONE_NEWNS) }); err != nil {
			return err
		}
		if err := dir.Chdir(); err != nil {
			return err
		}
		return do()
	})
}

// onThread calls do on a thread of its own, which ends with it. It is not the main thread, which would stay, and whose mount namespace is
// the one that /proc/self shows.
func onThread(do func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			result <- onThread(do)
			return
		}
		result <- do()
	}()
	return <-result
}
