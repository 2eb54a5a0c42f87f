package unpack_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/erofs"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
	"github.com/overlay-csi/overlay-csi/test/erofstest"
	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// compareImage unpacks a tar into an EROFS image too, and compares it with the tree that Tar made: every tar that a test unpacks is
// unpacked twice.
func compareImage(t *testing.T, data []byte, tree string, limits unpack.Limits, want unpack.Result, wantErr error) {
	t.Helper()
	dir := t.TempDir()
	metadata, content, scratch := filepath.Join(dir, "metadata"), filepath.Join(dir, "data"), filepath.Join(dir, "scratch")
	must(t, os.Mkdir(scratch, 0o700))
	got, err := unpack.EROFS(t.Context(), bytes.NewReader(data), metadata, content, scratch, limits)
	switch {
	case wantErr != nil && errdefs.IsInvalidArgument(wantErr) && !errdefs.IsInvalidArgument(err):
		t.Errorf("of an image: %v\nof a tree: %v", err, wantErr)
	case wantErr != nil:
		// Another error may be one of the disk, or of its room, of which an image takes less.
		return
	case errors.Is(err, erofs.ErrCannotHold):
		t.Logf("no image: %v", err)
		return
	case err != nil:
		t.Errorf("of an image: %v\nof a tree: none", err)
		return
	}
	got.DiskBytes = want.DiskBytes
	if got != want {
		t.Errorf("of an image: %+v\nof a tree: %+v", got, want)
	}
	mounted := erofstest.Check(t, metadata, content)
	treeLines, imageLines := erofstest.Read(t, tree), erofstest.Read(t, mounted)
	for name := range impliedIn(t, tree) {
		// Their times are those of unpacking.
		delete(treeLines, name)
		delete(imageLines, name)
	}
	for name, line := range imageLines {
		// So are those of a directory without an entry that is not implied, because a whiteout says that it is another one.
		mode, after, ok := strings.Cut(line, " time 0.000000000")
		if ok && strings.HasPrefix(line, "mode 4") && strings.HasPrefix(treeLines[name], mode+" time ") {
			treeLines[name] = mode + " time 0.000000000" + treeLines[name][strings.Index(treeLines[name], " links "):]
			imageLines[name] = mode + " time 0.000000000" + after
		}
	}
	treeLines.Compare(t, "the kernel, in an image", imageLines)
	if got, want := impliedIn(t, mounted), impliedIn(t, tree); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("implied directories of an image: %q\nof a tree: %q", got, want)
	}
}

// impliedIn returns the attributes of the implied directories, without their times.
func impliedIn(t *testing.T, root string) map[string]string {
	t.Helper()
	found := map[string]string{}
	must(t, filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return err
		}
		dir := openPath(t, path)
		defer dir.Close()
		isImplied, err := unpack.IsImplied(dir)
		if !isImplied {
			return err
		}
		name, err := filepath.Rel(root, path)
		var stat unix.Stat_t
		must(t, unix.Stat(path, &stat))
		found[name] = fmt.Sprintf("mode %o owner %d:%d links %d%s", stat.Mode, stat.Uid, stat.Gid, stat.Nlink, xattrsOf(t, path))
		return err
	}))
	return found
}

// FuzzEROFS unpacks random trees into a directory and into an image, which the kernel, go-erofs and fsck.erofs read back. Other than
// FuzzUnpack, it spends no time on tars that cannot be read.
func FuzzEROFS(f *testing.F) {
	needs.Root(f)
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 2))
		data := make([]byte, 400)
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var entries []registrytest.Entry
		for ; len(data) >= 5 && len(entries) < 300; data = data[5:] {
			entries = append(entries, entryOf([5]byte(data)))
		}
		dir := t.TempDir()
		// Both must refuse the same layers. Of one that is refused, the first half may be taken.
		for ; len(entries) > 0; entries = entries[:len(entries)/2] {
			archive, err := registrytest.Tar(entries...)
			if err != nil {
				t.Skip(err)
			}
			_, err = unpackTar(t, archive, filepath.Join(dir, fmt.Sprint("tree-", len(entries))), unpack.Limits{})
			if err == nil {
				break
			}
			if !errdefs.IsInvalidArgument(err) {
				t.Error(err)
			}
		}
	})
}

// entryOf returns the entry that five bytes choose: the type, the name, the attributes, the size, and what is special.
func entryOf(choice [5]byte) registrytest.Entry {
	names := []string{
		"a", "b", "a/a", "a/b", "a/b/c", "b/d", "-", "!", "a/ ", "\xff", ".wh.a", "a/.wh.b", "a/.wh..wh..opq", "b/.wh..wh..opq", "./", "l/x",
		strings.Repeat("n", 255), "a/" + strings.Repeat("m", 200) + "/" + strings.Repeat("o", 255), "..", "a/b/c/../../z", "l", "a/l/y", ".wh.l",
		"b/many",
	}
	name := names[int(choice[1])%len(names)]
	if name == "b/many" {
		name += fmt.Sprint(choice[2]) + strings.Repeat("x", int(choice[3]))
	}
	if name == "./" {
		choice[0] = 3
	}
	types := []byte{
		tar.TypeReg, tar.TypeReg, tar.TypeReg, tar.TypeDir, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeChar, tar.TypeBlock,
		tar.TypeFifo,
	}
	at := int64(choice[2])
	e := registrytest.Entry{Header: tar.Header{
		Typeflag: types[int(choice[0])%len(types)], Name: name, Mode: at * 67 & 0o7777, Uid: int(at) << 9, Gid: int(at) * 3,
		ModTime: time.Unix(at*1e7-1e8, at*3_900_000), Format: tar.FormatPAX,
	}}
	switch e.Typeflag {
	case tar.TypeReg:
		sizes := []int{0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 200_000, 400_000}
		content := bytes.Repeat([]byte{choice[3] | 1}, sizes[int(choice[3])%len(sizes)])
		if choice[4]&1 != 0 {
			clear(content[len(content)/4 : len(content)-len(content)/8])
		}
		if choice[4]&2 != 0 {
			clear(content[:len(content)/2])
		}
		if choice[4]&4 != 0 {
			clear(content[len(content)/2:])
		}
		e.Content = string(content)
	case tar.TypeSymlink:
		e.Linkname = []string{"a", "/b", "../a/b", "l", "nowhere", strings.Repeat("t", 4095), strings.Repeat("t/", 1000)}[choice[3]%7]
	case tar.TypeLink:
		e.Linkname = names[int(choice[3])%len(names)]
	case tar.TypeChar, tar.TypeBlock:
		e.Devmajor, e.Devminor = int64(choice[3])*16, int64(choice[4])*4000
	}
	records := map[string]string{}
	for bit, value := range map[byte][2]string{
		8: {"user.small", "x"}, 16: {"trusted.t" + fmt.Sprint(choice[3]), ""}, 32: {"user.large", strings.Repeat("y", 1000+int(choice[3]))},
		64: {"system.posix_acl_access", acl}, 128: {"security.other", fmt.Sprint(choice[3] % 4)},
	} {
		if choice[4]&bit != 0 {
			records[unpack.XattrRecord+value[0]] = value[1]
		}
	}
	e.PAXRecords = records
	return e
}

// acl is an access control list: of the owner, user 1000, the group, a mask, and others.
const acl = "\x02\x00\x00\x00" + "\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x05\x00\xe8\x03\x00\x00" +
	"\x04\x00\x01\x00\xff\xff\xff\xff" + "\x10\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x04\x00\xff\xff\xff\xff"

// TestEROFSHoldsOnly checks the errors for layers that a directory can hold and an image cannot.
func TestEROFSHoldsOnly(t *testing.T) {
	many := func(count int, change func(i int, e *registrytest.Entry)) io.Reader {
		return &generated{count: count, change: change}
	}
	for name, c := range map[string]struct {
		from io.Reader
		word string
	}{
		"names": {many(erofs.MaxEntries, func(i int, e *registrytest.Entry) {
			e.Name = fmt.Sprintf("%0250d", i)
		}), "33554432 bytes"},
		"links": {many(erofs.MaxEntries, func(_ int, e *registrytest.Entry) {
			e.Typeflag, e.Linkname = tar.TypeSymlink, strings.Repeat("x", 4000)
		}), "33554432 bytes"},
		"attributes": {many(erofs.MaxEntries, func(i int, e *registrytest.Entry) {
			e.PAXRecords = map[string]string{"SCHILY.xattr.user.x": fmt.Sprint(i, strings.Repeat("x", 60_000))}
		}), "33554432 bytes"},
		"attribute of 64 KiB": {many(1, func(_ int, e *registrytest.Entry) {
			e.PAXRecords = map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 64<<10)}
		}), "one less"},
		"attributes of a file": {many(1, func(_ int, e *registrytest.Entry) {
			e.PAXRecords = map[string]string{}
			for i := range 5 {
				e.PAXRecords["SCHILY.xattr.user.x"+fmt.Sprint(i)] = fmt.Sprint(i, strings.Repeat("x", 60_000))
			}
		}), "extended attributes of a file"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			_, err := unpack.EROFS(t.Context(), c.from, filepath.Join(dir, "metadata"), filepath.Join(dir, "data"), t.TempDir(), unpack.Limits{})
			if !errors.Is(err, erofs.ErrCannotHold) || errdefs.IsInvalidArgument(err) {
				t.Fatalf("%v, want %v alone", err, erofs.ErrCannotHold)
			}
			wantError(t, err, c.word)
		})
	}
}

// generated is a tar of empty files, 500 in each directory, that is not in memory.
type generated struct {
	count  int
	change func(i int, e *registrytest.Entry)

	next   int
	buffer bytes.Buffer
	writer *tar.Writer
}

func (g *generated) Read(data []byte) (int, error) {
	if g.writer == nil {
		g.writer = tar.NewWriter(&g.buffer)
	}
	for g.buffer.Len() == 0 {
		if g.next > g.count {
			return 0, io.EOF
		}
		if g.next == g.count {
			g.next++
			if err := g.writer.Close(); err != nil {
				return 0, err
			}
			continue
		}
		e := registrytest.File(fmt.Sprintf("dir-%d/file-name-%d", g.next/500, g.next), "")
		if g.change != nil {
			g.change(g.next, &e)
		}
		g.next++
		if err := g.writer.WriteHeader(&e.Header); err != nil {
			return 0, err
		}
	}
	return g.buffer.Read(data)
}

// BenchmarkEROFSOfAMillion reports the peak memory of the process while an image of 1,000,000 entries is written, and what is on the heap
// at its end.
func BenchmarkEROFSOfAMillion(b *testing.B) {
	const entries = 1_000_000
	for b.Loop() {
		dir := b.TempDir()
		if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0o200); err != nil {
			b.Skip(err)
		}
		result, err := unpack.EROFS(b.Context(), &generated{count: entries}, filepath.Join(dir, "metadata"), filepath.Join(dir, "data"), dir,
			unpack.Limits{})
		if err != nil {
			b.Fatal(err)
		}
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			b.Fatal(err)
		}
		_, after, _ := strings.Cut(string(status), "VmHWM:")
		var peak int64
		if _, err := fmt.Sscan(after, &peak); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(peak)/1024, "peak-MiB")
		b.ReportMetric(float64(result.DiskBytes)/entries, "disk-B/entry")
	}
}
