package store

import (
	"archive/tar"
	"bufio"
	"encoding/gob"
	"fmt"
	"io"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// dirTime is when a directory was changed. It is set when nothing will be made in the directory any more.
type dirTime struct {
	Name        string
	Seconds     int64
	Nanoseconds int
}

// finish sets the times of directories.
func (u *unpacker) finish() error {
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
		fd, err := unix.Openat2(int(u.root.Fd()), "./"+t.Name, &unix.OpenHow{
			Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		if err != nil {
			// A later entry replaced it.
			continue
		}
		at := unixTime(time.Unix(t.Seconds, int64(t.Nanoseconds)))
		err = futimens(fd, &[2]unix.Timespec{at, at})
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("utimensat %s: %w", t.Name, err)
		}
	}
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
