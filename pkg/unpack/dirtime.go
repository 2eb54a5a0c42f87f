package unpack

import (
	"bufio"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"time"
)

// dirTime is the modification time of a directory. It is stored as gob.
type dirTime struct {
	Name        string
	Seconds     int64
	Nanoseconds int
}

// setDirTimes sets the recorded times of all directories. It comes last, because creating a file changes the time of its
// directory.
func (u *unpacker) setDirTimes() error {
	u.closeParents()
	if err := u.timesOut.Flush(); err != nil {
		return err
	}
	if _, err := u.times.Seek(0, io.SeekStart); err != nil {
		return err
	}
	decoder := gob.NewDecoder(bufio.NewReader(u.times))
	for {
		var t dirTime
		if err := decoder.Decode(&t); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := u.setDirTime(t); err != nil {
			return err
		}
	}
}

// setDirTime sets the times of one directory. It ignores a directory that a later entry replaced.
func (u *unpacker) setDirTime(t dirTime) error {
	dir, err := u.tree.open(t.Name, openToSetTimes)
	switch {
	case isAbsent(err):
		return nil
	case err != nil:
		return fmt.Errorf("set the times of directory %q: %w", t.Name, err)
	}
	defer dir.close()
	at := time.Unix(t.Seconds, int64(t.Nanoseconds))
	return dir.setTimes(at, at)
}
