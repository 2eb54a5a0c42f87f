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

// setDirTime sets the times of a directory, unless a later entry replaced it.
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

// timesOf returns the access and modification times of an entry.
func timesOf(header *tar.Header) (accessed, modified time.Time) {
	if header.AccessTime.IsZero() {
		return header.ModTime, header.ModTime
	}
	return header.AccessTime, header.ModTime
}
