package linux

import (
	"errors"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// call makes a system call on an open file, again while signals interrupt it.
func call(op string, file *os.File, do func(fd int) error) error {
	return callAt(op, file, "", do)
}

// callAt makes a system call on a path in a directory, again while signals interrupt it.
func callAt(op string, dir *os.File, path string, do func(fd int) error) error {
	if err := retry(func() error { return do(fdOf(dir)) }); err != nil {
		return &os.PathError{Op: op, Path: fullPath(dir, path), Err: err}
	}
	runtime.KeepAlive(dir)
	return nil
}

// callLink makes a system call on two paths, again while signals interrupt it.
func callLink(op string, oldDir *os.File, oldPath string, newDir *os.File, newPath string, do func(oldFD, newFD int) error) error {
	if err := retry(func() error { return do(fdOf(oldDir), fdOf(newDir)) }); err != nil {
		return &os.LinkError{Op: op, Old: fullPath(oldDir, oldPath), New: fullPath(newDir, newPath), Err: err}
	}
	runtime.KeepAlive(oldDir)
	runtime.KeepAlive(newDir)
	return nil
}

// open makes a system call that returns a descriptor, again while signals interrupt it, and gives the handle a name.
func open(op string, dir *os.File, path, name string, do func(fd int) (int, error)) (*os.File, error) {
	var opened int
	err := callAt(op, dir, path, func(fd int) (err error) {
		opened, err = do(fd)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(opened), name), nil
}

func retry(do func() error) error {
	for {
		if err := do(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// fdOf is the descriptor of a directory that paths are looked up in.
func fdOf(dir *os.File) int {
	if dir == nil {
		return unix.AT_FDCWD
	}
	return int(dir.Fd())
}

// fullPath is what a file beneath dir is called in errors, and what is shown of it.
func fullPath(dir *os.File, path string) string {
	switch {
	case dir == nil:
		return path
	case path == "" || path == ".":
		return dir.Name()
	}
	return strings.TrimRight(dir.Name(), "/") + "/" + strings.TrimLeft(path, "/")
}
