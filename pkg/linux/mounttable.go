package linux

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
)

const (
	// shortMountLine is what mountinfo reads as one line. Longer ones are read here.
	shortMountLine = 32 << 10
	// longMountLine bounds a line of the mount table. It has two paths of a mount, which a pod may have moved down below any number of
	// directories, and the paths of an overlay's layers.
	longMountLine = 4 << 20
	// longMountPaths bounds what the two paths of all mounts with long lines have together.
	longMountPaths = 4 << 20
)

// Fields of a line of the mount table (proc_pid_mountinfo(5)) which may be long. The last one has the options of the file system: the
// directories of an overlay are in it.
const (
	mountRoot   = 3
	mountPoint  = 4
	mountFields = 10
)

// Mounts returns the mounts of this mount namespace that a filter, if there is one, does not skip. Unlike mountinfo.GetMounts it reads a
// table with lines of more than 64 KiB. It leaves out mounts whose line is longer than 4 MiB, and those with long lines whose paths do not
// fit into 4 MiB with those before.
func Mounts(filter mountinfo.FilterFunc) ([]*mountinfo.Info, error) {
	// The thread must not end while its table is read.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	table, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer table.Close()
	return parseMounts(table, filter)
}

func parseMounts(table io.Reader, filter mountinfo.FilterFunc) ([]*mountinfo.Info, error) {
	if filter == nil {
		filter = func(*mountinfo.Info) (skip, stop bool) { return false, false }
	}
	var mounts []*mountinfo.Info
	reader := bufio.NewReaderSize(table, shortMountLine)
	// short are the lines since the last long one.
	var short bytes.Buffer
	longPaths := 0
	parseShort := func() error {
		more, err := mountinfo.GetMountsFromReader(&short, filter)
		mounts = append(mounts, more...)
		short.Reset()
		return err
	}
	for {
		line, err := reader.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			if err := parseShort(); err != nil {
				return nil, err
			}
			line, err := readLongLine(reader, line)
			if errors.Is(err, bufio.ErrTooLong) {
				continue
			}
			if err != nil {
				return nil, err
			}
			mount, err := parseLongMount(line)
			if err != nil {
				return nil, err
			}
			paths := len(mount.Root) + len(mount.Mountpoint)
			if longPaths+paths > longMountPaths {
				continue
			}
			if skip, _ := filter(mount); !skip {
				longPaths += paths
				mounts = append(mounts, mount)
			}
			continue
		}
		short.Write(line)
		if errors.Is(err, io.EOF) {
			return mounts, parseShort()
		}
		if err != nil {
			return nil, err
		}
	}
}

// readLongLine reads the rest of a long line. It returns ErrTooLong after one that is too long.
func readLongLine(reader *bufio.Reader, begin []byte) (string, error) {
	line, tooLong := slices.Clone(begin), false
	for {
		more, err := reader.ReadSlice('\n')
		tooLong = tooLong || len(line)+len(more) > longMountLine
		if !tooLong {
			line = append(line, more...)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		break
	}
	if tooLong {
		return "", bufio.ErrTooLong
	}
	return strings.TrimSuffix(string(line), "\n"), nil
}

// parseLongMount has mountinfo parse a line without what is long in it.
func parseLongMount(line string) (*mountinfo.Info, error) {
	fields := strings.Split(line, " ")
	if len(fields) < mountFields {
		return nil, fmt.Errorf("parse the mount table: a line with %d fields", len(fields))
	}
	last := len(fields) - 1
	root, point, options := fields[mountRoot], fields[mountPoint], fields[last]
	fields[mountRoot], fields[mountPoint], fields[last] = "/", "/", "rw"
	mounts, err := mountinfo.GetMountsFromReader(strings.NewReader(strings.Join(fields, " ")), nil)
	if err != nil {
		return nil, err
	}
	mounts[0].Root, mounts[0].Mountpoint, mounts[0].VFSOptions = unescapeMount(root), unescapeMount(point), options
	return mounts[0], nil
}

// unescapeMount is the path that a field of the mount table stands for: some bytes are written as three octal digits.
func unescapeMount(field string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#").Replace(field)
}
