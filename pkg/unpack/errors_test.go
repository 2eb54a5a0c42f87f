package unpack_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestWrongLayersAreInvalid checks the error of each fault that a layer can have.
func TestWrongLayersAreInvalid(t *testing.T) {
	entry := func(header tar.Header) registrytest.Entry {
		header.Mode = 0o644
		return registrytest.Entry{Header: header}
	}
	link := func(name, target string) registrytest.Entry {
		return entry(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target})
	}
	hard := func(name, target string) registrytest.Entry {
		return entry(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target})
	}
	device := func(typeflag byte, major, minor int64) registrytest.Entry {
		return entry(tar.Header{Typeflag: typeflag, Name: "device", Devmajor: major, Devminor: minor, Format: tar.FormatGNU})
	}
	xattr := func(name, value string) registrytest.Entry {
		return entry(tar.Header{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{"SCHILY.xattr." + name: value}})
	}
	whole := mustTar(t, registrytest.File("f", strings.Repeat("x", 100_000)))
	// The writer knows no sparse files.
	sparse := bytes.ReplaceAll(mustTar(t, entry(tar.Header{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{
		"gnu.sparse.size": "20", "gnu.sparse.numblocks": "1", "gnu.sparse.map": "0,10", "gnu.sparse.major": "0", "gnu.sparse.minor": "1",
	}})), []byte("gnu.sparse"), []byte("GNU.sparse"))
	for name, c := range map[string]struct {
		entries []registrytest.Entry
		// data is the tar if there are no entries.
		data  []byte
		words []string
	}{
		"name over 255 bytes": {
			entries: []registrytest.Entry{registrytest.File(strings.Repeat("x", 256), "")}, words: []string{"name too long"},
		},
		"directory over 255 bytes": {
			entries: []registrytest.Entry{registrytest.Dir(strings.Repeat("x", 256))}, words: []string{"name too long"},
		},
		"parent over 255 bytes": {
			entries: []registrytest.Entry{registrytest.File(strings.Repeat("x", 256)+"/f", "")}, words: []string{"name too long"},
		},
		"whiteout over 255 bytes": {
			entries: []registrytest.Entry{registrytest.File(".wh."+strings.Repeat("x", 256), "")}, words: []string{"name too long"},
		},
		"path over PATH_MAX": {
			entries: []registrytest.Entry{registrytest.File(strings.Repeat("x/", 2048)+"x", "")}, words: []string{"4095"},
		},
		"target of PATH_MAX":   {entries: []registrytest.Entry{link("l", strings.Repeat("x", 4096))}, words: []string{"4095"}},
		"target over PATH_MAX": {entries: []registrytest.Entry{link("l", strings.Repeat("x", 5000))}, words: []string{"4095"}},
		"link to nothing":      {entries: []registrytest.Entry{link("l", "")}, words: []string{`"l"`}},
		"path through a file": {
			entries: []registrytest.Entry{registrytest.File("f", ""), registrytest.File("f/g", "")}, words: []string{"f/g"},
		},
		"path through a dead link": {
			entries: []registrytest.Entry{link("l", "nowhere"), registrytest.File("l/g", "")}, words: []string{"l/g"},
		},
		"path through a loop": {entries: []registrytest.Entry{link("l", "l"), registrytest.File("l/g", "")}, words: []string{"l/g"}},
		"hard link to a directory": {
			entries: []registrytest.Entry{registrytest.Dir("d"), hard("h", "d")}, words: []string{`"h"`, `"d"`, "is a directory"},
		},
		"hard link to a lower layer": {
			entries: []registrytest.Entry{hard("h", "usr/bin/tool")}, words: []string{`"h"`, `"usr/bin/tool"`, "not in this layer"},
		},
		"hard link to a file of a lower layer's directory": {
			entries: []registrytest.Entry{registrytest.Dir("usr"), hard("h", "usr/tool")}, words: []string{`"h"`, `"usr/tool"`, "not in this layer"},
		},
		"hard link to itself": {entries: []registrytest.Entry{hard("h", "h")}, words: []string{`"h"`, "not in this layer"}},
		// What mknod(2) takes of 32 bits would be a whiteout.
		"device 4096:0": {entries: []registrytest.Entry{device(tar.TypeChar, 4096, 0)}, words: []string{`"device"`, "4096:0"}},
		"device 0:1048576": {
			entries: []registrytest.Entry{device(tar.TypeChar, 0, 1<<20)}, words: []string{`"device"`, "0:1048576"},
		},
		"device 1:2^32+3": {
			entries: []registrytest.Entry{device(tar.TypeChar, 1, 1<<32+3)}, words: []string{`"device"`, "1:4294967299"},
		},
		"device below 0": {entries: []registrytest.Entry{device(tar.TypeBlock, -1, 0)}, words: []string{`"device"`, "-1:0"}},
		"owner over 32 bits": {
			entries: []registrytest.Entry{entry(tar.Header{Typeflag: tar.TypeReg, Name: "f", Uid: 1 << 32})}, words: []string{"4294967296:0"},
		},
		"group over 32 bits": {
			entries: []registrytest.Entry{entry(tar.Header{Typeflag: tar.TypeDir, Name: "f", Gid: 1 << 32})}, words: []string{"0:4294967296"},
		},
		"owner of a link": {
			entries: []registrytest.Entry{entry(tar.Header{Typeflag: tar.TypeSymlink, Name: "f", Linkname: "x", Uid: 1 << 32})},
			words:   []string{"4294967296:0"},
		},
		"attribute's name": {
			entries: []registrytest.Entry{xattr("user."+strings.Repeat("x", 255), "x")}, words: []string{"setxattr user.xxx"},
		},
		"attribute over 64 KiB": {
			entries: []registrytest.Entry{xattr("user.x", strings.Repeat("x", 64<<10+1))}, words: []string{"setxattr user.x"},
		},
		"attribute of no meaning": {
			entries: []registrytest.Entry{xattr("security.capability", "x")}, words: []string{"security.capability"},
		},
		"truncated file":           {data: whole[:len(whole)/2], words: []string{"unexpected EOF"}},
		"truncated header":         {data: whole[:700], words: []string{"unexpected EOF"}},
		"no tar":                   {data: bytes.Repeat([]byte("no tar "), 1000), words: []string{"invalid tar header"}},
		"sparse file without data": {data: sparse, words: []string{"sparse file"}},
	} {
		t.Run(name, func(t *testing.T) {
			data := c.data
			if data == nil {
				data = mustTar(t, c.entries...)
			}
			_, err := unpackTar(t, data, filepath.Join(workDir(t), "tree"), unpack.Limits{})
			wantError(t, err, c.words...)
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("the error is of another kind: %v", err)
			}
		})
	}
}

// TestErrorsOfTheMachineAreNotOfTheLayer: what a person should look into then is the disk or the network, not the image.
func TestErrorsOfTheMachineAreNotOfTheLayer(t *testing.T) {
	needs.Root(t)
	failed := fmt.Errorf("connection closed: %w", io.EOF)
	for name, from := range map[string]io.Reader{
		"between entries": io.MultiReader(bytes.NewReader(mustTar(t, registrytest.File("f", "x"))[:1024]), failing{failed}),
		"within a file": io.MultiReader(
			bytes.NewReader(mustTar(t, registrytest.File("f", strings.Repeat("x", 100_000)))[:2048]), failing{failed}),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := unpack.Tar(t.Context(), from, filepath.Join(workDir(t), "tree"), t.TempDir(), unpack.Limits{})
			if !errors.Is(err, failed) || errdefs.IsInvalidArgument(err) {
				t.Errorf("%v, want %v alone", err, failed)
			}
		})
	}
	t.Run("no inodes for the parents", func(t *testing.T) {
		dir := t.TempDir()
		must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_inodes=20"))
		t.Cleanup(func() { must(t, drivertest.UnmountBeneath(dir)) })
		_, err := unpackTar(t, mustTar(t, registrytest.File(strings.Repeat("d/", 30)+"f", "x")), filepath.Join(dir, "tree"), unpack.Limits{})
		if !errors.Is(err, syscall.ENOSPC) || errdefs.IsInvalidArgument(err) {
			t.Errorf("%v, want %v alone", err, syscall.ENOSPC)
		}
	})
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// TestAttributesTakeSpace checks that extended attributes count against the limits: compressed, they are next to nothing.
func TestAttributesTakeSpace(t *testing.T) {
	needs.Root(t)
	const size, files = 60_000, 1200
	many := func(files int, entries ...registrytest.Entry) []byte {
		for i := range files {
			e := registrytest.File(fmt.Sprint(i), "")
			e.PAXRecords = map[string]string{"SCHILY.xattr.user.a": strings.Repeat("x", size)}
			entries = append(entries, e)
		}
		return mustTar(t, entries...)
	}
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	needs.Program(t, drivertest.MakeImage("xfs", image, 320<<20, ""))
	must(t, drivertest.MountImage("xfs", image, dir))
	t.Cleanup(func() { must(t, drivertest.UnmountBeneath(dir)) })
	if result := mustUnpack(t, many(3), filepath.Join(dir, "small")); result.DiskBytes < 3*size {
		t.Errorf("the layer is said to take %d bytes; the attributes alone have %d", result.DiskBytes, 3*size)
	}
	_, err := unpackTar(t, many(files), filepath.Join(dir, "reserve"), unpack.Limits{MinFreePercent: 75})
	wantError(t, err, "--min-free-disk-percent")
	// Content and attributes are each within the limit.
	both := many(10, registrytest.File("f", strings.Repeat("x", 700_000)))
	_, err = unpackTar(t, both, filepath.Join(dir, "limit"), unpack.Limits{MaxBytes: 1 << 20})
	wantError(t, err, "--max-layer-size")
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("the error is of another kind: %v", err)
	}
}

// TestReserveOfASmallDisk: somebody else fills the disk amid a layer. Of the reserve, next to nothing is taken.
func TestReserveOfASmallDisk(t *testing.T) {
	needs.Root(t)
	const size, reserve = 64 << 20, 16 << 20
	others := func(dir string) io.Reader {
		return readerFunc(func([]byte) (int, error) {
			must(t, os.WriteFile(filepath.Join(dir, "others"), make([]byte, 40<<20), 0o600))
			return 0, io.EOF
		})
	}
	data := mustTar(t, registrytest.File("f", strings.Repeat("x", 24<<20)))
	limits := unpack.Limits{MinFreePercent: 100 * reserve / size}
	for name, write := range map[string]func(dir string, from io.Reader) error{
		"layer": func(dir string, from io.Reader) error {
			must(t, os.Mkdir(filepath.Join(dir, "scratch"), 0o700))
			_, err := unpack.Tar(t.Context(), from, filepath.Join(dir, "tree"), filepath.Join(dir, "scratch"), limits)
			return err
		},
		"archive": func(dir string, from io.Reader) error {
			file, err := os.Create(filepath.Join(dir, "archive"))
			must(t, err)
			defer file.Close()
			_, err = limits.CopyToFile(t.Context(), file, from)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)))
			t.Cleanup(func() { must(t, drivertest.UnmountBeneath(dir)) })
			err := write(dir, io.MultiReader(bytes.NewReader(data[:4<<20]), others(dir), bytes.NewReader(data[4<<20:])))
			wantError(t, err, "--min-free-disk-percent")
			var disk unix.Statfs_t
			must(t, unix.Statfs(dir, &disk))
			if left := int64(disk.Bavail) * disk.Bsize; left < reserve/2 {
				t.Errorf("%d MiB are left of the reserve", left>>20)
			}
		})
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(buffer []byte) (int, error) { return f(buffer) }

// TestReplacedDirectoriesTakeNoMemory: entries may replace one directory any number of times.
func TestReplacedDirectoriesTakeNoMemory(t *testing.T) {
	needs.Root(t)
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	t.Cleanup(func() { must(t, drivertest.UnmountBeneath(dir)) })
	must(t, os.Mkdir(filepath.Join(dir, "scratch"), 0o700))
	const replaced = 50_000
	// A tar ends with two empty blocks.
	pair := mustTar(t, registrytest.Dir("d"), registrytest.File("d", ""))
	pair = pair[:len(pair)-1024]
	from := &endless{data: pair}
	var before, after uint64
	reader := io.MultiReader(
		io.LimitReader(from, int64(len(pair))*10), heapReader{&before},
		io.LimitReader(from, int64(len(pair))*replaced), heapReader{&after})
	_, err := unpack.Tar(t.Context(), reader, filepath.Join(dir, "tree"), filepath.Join(dir, "scratch"), unpack.Limits{})
	must(t, err)
	if grown := int64(after) - int64(before); grown > replaced*20 {
		t.Errorf("%d bytes for each of %d replaced directories", grown/replaced, replaced)
	}
}

// heapReader reads nothing. It sets to to the bytes of the heap that are in use.
type heapReader struct{ to *uint64 }

func (r heapReader) Read([]byte) (int, error) {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	*r.to = stats.HeapAlloc
	return 0, io.EOF
}
