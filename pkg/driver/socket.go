package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// dialTimeout bounds how long it takes to see whether a process listens on a socket.
const dialTimeout = time.Second

// socket is a unix socket that this process listens on, and the file that it made for it.
type socket struct {
	net.Listener
	path string
	// file tells the file from one that another process makes at path. The inode is not used again while the listener is open.
	file fs.FileInfo
}

// listen creates the socket. It replaces a socket that a crash left, and refuses to replace any other file.
func listen(path string) (*socket, error) {
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("listen on %s: the file exists and is not a socket", path)
	case err == nil:
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove the socket of an earlier process: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, fmt.Errorf("create the directory of the socket: %w", err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	// The file at path may be another process's when the listener is closed.
	listener.SetUnlinkOnClose(false)
	// Whoever can write to the socket can have directories mounted.
	if err := os.Chmod(path, 0o600); err != nil {
		listener.Close()
		return nil, fmt.Errorf("restrict access to the socket: %w", err)
	}
	file, err := os.Lstat(path)
	if err != nil {
		listener.Close()
		return nil, fmt.Errorf("look at the socket: %w", err)
	}
	return &socket{Listener: listener, path: path, file: file}, nil
}

// isThere reports whether the file at the socket's path is the one that this process made.
func (s *socket) isThere() bool {
	info, err := os.Lstat(s.path)
	return err == nil && os.SameFile(info, s.file)
}

// isTaken reports whether another process listens at the socket's path. The socket itself must not be there.
func (s *socket) isTaken(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", s.path)
	if err == nil {
		conn.Close()
	}
	// EAGAIN: it has more clients than it accepts.
	return err == nil || errors.Is(err, syscall.EAGAIN) || errors.Is(err, context.DeadlineExceeded)
}

// remove removes the file if it is this process's.
func (s *socket) remove() {
	if s.isThere() {
		os.Remove(s.path)
	}
}
