package erofs_test

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/erofs"
)

// TestErrors checks that the methods return the errors of system calls.
func TestErrors(t *testing.T) {
	b := build(t)
	root := b.Root()
	file := b.file(root, "f", 0, nil)
	dir := b.dir(root, "d")
	for link, target := range map[string]string{"loop": "loop", "up": "../../d", "absolute": "/d/../d", "file": "f", "dead": "/nowhere"} {
		_, err := b.Symlink(target, root, link)
		must(t, err)
	}
	long := strings.Repeat("x", 256)
	second := func(_ erofs.Inode, err error) error { return err }
	for name, c := range map[string]struct{ got, want error }{
		"exists":              {second(b.Mkdir(root, "f", 0)), syscall.EEXIST},
		"no directory":        {second(b.Mkdir(file, "x", 0)), syscall.ENOTDIR},
		"long name":           {second(b.Mkdir(root, long, 0)), syscall.ENAMETOOLONG},
		"long name, looked":   {second(b.Lookup(root, long)), syscall.ENAMETOOLONG},
		"absent":              {second(b.Lookup(root, "x")), syscall.ENOENT},
		"long target":         {second(b.Symlink(strings.Repeat("x", 4096), root, "x")), syscall.ENAMETOOLONG},
		"no target":           {second(b.Symlink("", root, "x")), syscall.ENOENT},
		"link of a directory": {b.Link(dir, root, "x"), syscall.EPERM},
		"remove nothing":      {b.Remove(root, "x"), syscall.ENOENT},
		"open a loop":         {second(b.Open("loop")), syscall.ELOOP},
		"open through a file": {second(b.Open("f/x")), syscall.ENOTDIR},
		"open a file":         {second(b.Open("f")), syscall.ENOTDIR},
		"open a link":         {second(b.Open("file")), syscall.ENOTDIR},
		"open a dead link":    {second(b.Open("dead")), syscall.ENOENT},
		"open up":             {second(b.Open("up")), nil},
		"open absolute":       {second(b.Open("absolute/../../d")), nil},
		"open no link":        {second(b.OpenNoLinks("up")), syscall.ELOOP},
		"open without links":  {second(b.OpenNoLinks("d/../d")), nil},
		"attribute of nobody": {b.SetXattr(file, "nobody.x", nil), syscall.EOPNOTSUPP},
		"no name":             {b.SetXattr(file, "user.", nil), syscall.EINVAL},
		"long attribute name": {b.SetXattr(file, "user."+long, nil), syscall.ERANGE},
		"long attribute":      {b.SetXattr(file, "user.x", make([]byte, 65_537)), syscall.E2BIG},
		"no capability":       {b.SetXattr(file, "security.capability", []byte("x")), syscall.EINVAL},
		"no list":             {b.SetXattr(file, "system.posix_acl_access", []byte("\x02\x00\x00\x00x")), syscall.EINVAL},
		"default of a file":   {b.SetXattr(file, "system.posix_acl_default", []byte(acl(7, 5, 4))), syscall.EACCES},
		"remove no attribute": {b.RemoveXattr(file, "user.x"), syscall.ENODATA},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v, want %v", name, c.got, c.want)
		}
	}
}

// TestMaxEntries checks the error for more entries than an image holds, those that were removed included.
func TestMaxEntries(t *testing.T) {
	b := build(t)
	for n := range erofs.MaxEntries {
		name := fmt.Sprint(n % 1000)
		_, err := b.Mknod(b.Root(), name, syscall.S_IFIFO, 0)
		must(t, err)
		must(t, b.Remove(b.Root(), name))
	}
	if _, err := b.Mkdir(b.Root(), "d", 0o755); !errors.Is(err, erofs.ErrCannotHold) || !strings.Contains(err.Error(), "1048576 entries") {
		t.Errorf("%v, want %v", err, erofs.ErrCannotHold)
	}
}

// acl returns an access control list that says no more than permission bits.
func acl(user, group, other byte) string {
	entry := func(tag, permissions byte) string { return string([]byte{tag, 0, permissions, 0, 255, 255, 255, 255}) }
	return "\x02\x00\x00\x00" + entry(1, user) + entry(4, group) + entry(0x20, other)
}
