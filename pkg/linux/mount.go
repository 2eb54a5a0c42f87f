package linux

import (
	"os"

	"golang.org/x/sys/unix"
)

// Mount mounts a file system at a path (mount(2)). Flags are those of package syscall (syscall.MS_NOSUID, …).
func Mount(source, target, fsType string, flags uintptr, data string) error {
	return callAt("mount", nil, target, func(int) error { return unix.Mount(source, target, fsType, flags, data) })
}

// Unmount unmounts what is mounted at a path (umount(2)). A link at the end of the path is not followed.
func Unmount(path string) error { return unmount(path, 0) }

// UnmountLazily takes a mount out of the tree also while it is in use (umount(2), MNT_DETACH). A link at the end of the path is not
// followed.
func UnmountLazily(path string) error { return unmount(path, unix.MNT_DETACH) }

func unmount(path string, flags int) error {
	return callAt("umount", nil, path, func(int) error { return unix.Unmount(path, flags|unix.UMOUNT_NOFOLLOW) })
}

// DetachFile takes the mount whose root is this open directory out of the tree, also while it is in use (umount(2), MNT_DETACH).
func DetachFile(root *os.File) error {
	return call("umount", root, func(int) error { return unix.Unmount(ProcPath(root), unix.MNT_DETACH) })
}
