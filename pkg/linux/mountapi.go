package linux

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Attributes of a mount (mount_setattr(2), MOUNT_ATTR_*). They have other values than the MS_* flags of mount(2).
const (
	MountAttrReadOnly    = unix.MOUNT_ATTR_RDONLY
	MountAttrNoSUID      = unix.MOUNT_ATTR_NOSUID
	MountAttrNoDev       = unix.MOUNT_ATTR_NODEV
	MountAttrNoExec      = unix.MOUNT_ATTR_NOEXEC
	MountAttrNoSymFollow = unix.MOUNT_ATTR_NOSYMFOLLOW
	MountAttrNoDirATime  = unix.MOUNT_ATTR_NODIRATIME
	MountAttrRelATime    = unix.MOUNT_ATTR_RELATIME
	MountAttrNoATime     = unix.MOUNT_ATTR_NOATIME
	MountAttrStrictATime = unix.MOUNT_ATTR_STRICTATIME
	// MountAttrATime is the mask of the three above, to be cleared before one of them is set.
	MountAttrATime = unix.MOUNT_ATTR__ATIME
	MountAttrIDMap = unix.MOUNT_ATTR_IDMAP
)

// OpenTree returns a detached clone of the mount at a path in a directory, or of the directory itself with an empty path, as a bind
// mount has it: its root is the directory, and what is mounted beneath is not in it (open_tree(2), OPEN_TREE_CLONE).
func OpenTree(dir *os.File, path string) (*os.File, error) {
	return open("open_tree", dir, path, fullPath(dir, path), func(fd int) (int, error) {
		return unix.OpenTree(fd, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	})
}

// MoveMount attaches a detached mount at an open directory (move_mount(2)).
func MoveMount(mount, target *os.File) error {
	return callLink("move_mount", mount, "", target, "", func(mountFD, targetFD int) error {
		return unix.MoveMount(mountFD, "", targetFD, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	})
}

// MountChange is what [MountSetattr] changes of a mount.
type MountChange struct {
	// Set and Clear are attributes (MountAttr…).
	Set, Clear uint64
	// Private has nothing propagate to the mount or from it (MS_PRIVATE).
	Private bool
	// UserNamespace has the ID mapping, with [MountAttrIDMap] in Set.
	UserNamespace *os.File
}

// MountSetattr changes the attributes of a mount, which is named by its root (mount_setattr(2)).
func MountSetattr(mount *os.File, change MountChange) error {
	attr := unix.MountAttr{Attr_set: change.Set, Attr_clr: change.Clear}
	if change.Private {
		attr.Propagation = unix.MS_PRIVATE
	}
	if change.UserNamespace != nil {
		attr.Userns_fd = uint64(change.UserNamespace.Fd())
	}
	return call("mount_setattr", mount, func(fd int) error { return unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr) })
}

// FSContext is a file system that is being configured (fsopen(2)). Its errors are of type [FSContextError].
type FSContext struct {
	file   *os.File
	fsType string
}

// FSContextError is an error of the mount API with the kernel's own messages.
type FSContextError struct {
	// Call is the system call, with its command where that is fsconfig.
	Call string
	// FileSystem is the type of the file system.
	FileSystem string
	// Key and Value are the parameter that was set, "" for other calls.
	Key, Value string
	// Messages are what the kernel logged for the context.
	Messages []string
	Err      error
}

// Error names the call, the parameter and the kernel's messages.
func (e *FSContextError) Error() string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s %s", e.Call, e.FileSystem)
	if e.Key != "" {
		fmt.Fprintf(&text, " %s=%q", e.Key, e.Value)
	}
	fmt.Fprintf(&text, ": %v", e.Err)
	if len(e.Messages) > 0 {
		fmt.Fprintf(&text, " (%s)", strings.Join(e.Messages, "; "))
	}
	return text.String()
}

// Unwrap returns the error number.
func (e *FSContextError) Unwrap() error { return e.Err }

// Fsopen begins to configure a file system. The error is ENODEV where the kernel has no such type.
func Fsopen(fsType string) (*FSContext, error) {
	file, err := open("fsopen", nil, fsType, "fsopen:"+fsType, func(int) (int, error) { return unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC) })
	if err != nil {
		return nil, err
	}
	return &FSContext{file: file, fsType: fsType}, nil
}

// Close closes the context. What was mounted stays.
func (c *FSContext) Close() error { return c.file.Close() }

// SetString sets a parameter.
func (c *FSContext) SetString(key, value string) error {
	return c.do("fsconfig", key, value, func(fd int) error { return unix.FsconfigSetString(fd, key, value) })
}

// SetFlag sets a parameter that has no value.
func (c *FSContext) SetFlag(key string) error {
	return c.do("fsconfig", key, "", func(fd int) error { return unix.FsconfigSetFlag(fd, key) })
}

// SetFile sets a parameter to an open file.
func (c *FSContext) SetFile(key string, file *os.File) error {
	return c.do("fsconfig", key, file.Name(), func(fd int) error { return unix.FsconfigSetFd(fd, key, int(file.Fd())) })
}

// SetPath sets a parameter to the name of an open file in /proc, for a kernel that does not take the file itself.
func (c *FSContext) SetPath(key string, file *os.File) error {
	return c.do("fsconfig", key, file.Name(), func(fd int) error { return unix.FsconfigSetString(fd, key, ProcPath(file)) })
}

// Create makes the file system as it was configured.
func (c *FSContext) Create() error {
	return c.do("fsconfig create", "", "", unix.FsconfigCreate)
}

// Mount returns a detached mount of the file system with these attributes (MountAttr…).
func (c *FSContext) Mount(attributes uint64) (*os.File, error) {
	var mounted int
	err := c.do("fsmount", "", "", func(fd int) (err error) {
		mounted, err = unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, int(attributes))
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(mounted), "fsmount:"+c.fsType), nil
}

func (c *FSContext) do(name, key, value string, do func(fd int) error) error {
	err := retry(func() error { return do(int(c.file.Fd())) })
	if err == nil {
		return nil
	}
	return &FSContextError{Call: name, FileSystem: c.fsType, Key: key, Value: value, Messages: c.drain(), Err: err}
}

// drain reads the messages of the context, one a read, each with a severity letter and a space in front.
func (c *FSContext) drain() []string {
	var messages []string
	buffer := make([]byte, 1024)
	for {
		n, err := unix.Read(int(c.file.Fd()), buffer)
		if err != nil || n <= 0 {
			return messages
		}
		_, message, _ := strings.Cut(string(buffer[:n]), " ")
		messages = append(messages, strings.TrimSpace(message))
	}
}
