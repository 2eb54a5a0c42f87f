package unpack

import (
	"archive/tar"
	"bufio"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// dirTime is when a directory was changed. It is set when nothing will be made in the directory any more.
type dirTime struct {
	Name        string
	Seconds     int64
	Nanoseconds int
}

// setDirTimes sets the times of the directories, in which nothing will be made any more.
func (u *unpacker) setDirTimes() error {
	u.forgetParents()
	if err := u.timesOut.Flush(); err != nil {
		return err
	}
	if _, err := u.times.Seek(0, io.SeekStart); err != nil {
		return err
	}
	decoder := gob.NewDecoder(bufio.NewReader(u.times))
	for {
		var t dirTime
		if err := decoder.Decode(&t); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if err := u.setDirTime(t); err != nil {
			return err
		}
	}
}

// setDirTime sets the times of a directory. One that a later entry replaced is passed over; any other error of the lookup is one,
// since it would leave a wrong time.
func (u *unpacker) setDirTime(t dirTime) error {
	dir, err := linux.Open(u.root, "./"+t.Name, os.O_RDONLY|linux.O_DIRECTORY, linux.ResolveInRoot|linux.ResolveNoMagicLinks)
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP):
		return nil
	case err != nil:
		return fmt.Errorf("set the times of a directory: %w", err)
	}
	defer dir.Close()
	at := time.Unix(t.Seconds, int64(t.Nanoseconds))
	return linux.Futimens(dir, at, at)
}

func timesOf(header *tar.Header) [2]unix.Timespec {
	modified := unixTime(header.ModTime)
	if header.AccessTime.IsZero() {
		return [2]unix.Timespec{modified, modified}
	}
	return [2]unix.Timespec{unixTime(header.AccessTime), modified}
}

func unixTime(t time.Time) unix.Timespec {
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

// futimens is utimensat(2) on an open file: without a path, which Linux takes from 5.8 on only.
func futimens(fd int, times *[2]unix.Timespec) error {
	_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(times)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
