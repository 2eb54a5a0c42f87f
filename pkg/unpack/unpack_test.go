package unpack_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestWhiteoutAndDirectoryOfOneName checks that a directory with a whiteout in the same layer is opaque.
func TestWhiteoutAndDirectoryOfOneName(t *testing.T) {
	for name, entries := range map[string][]registrytest.Entry{
		"whiteout first":  {registrytest.File(".wh.d", ""), registrytest.Dir("d"), registrytest.File("d/own", "x")},
		"directory first": {registrytest.Dir("d"), registrytest.File("d/own", "x"), registrytest.File(".wh.d", "")},
	} {
		t.Run(name, func(t *testing.T) {
			tree := filepath.Join(workDir(t), "tree")
			mustUnpack(t, mustTar(t, entries...), tree)
			wantFile(t, filepath.Join(tree, "d/own"), "x")
			if attributes := xattrsOf(t, filepath.Join(tree, "d")); !strings.Contains(attributes, `trusted.overlay.opaque="y"`) {
				t.Errorf("what lower layers have in the directory shows: %s", attributes)
			}
		})
	}
}

// TestWhiteoutOfALongPath has the longest path of a whiteout that Linux takes.
func TestWhiteoutOfALongPath(t *testing.T) {
	deep := strings.Repeat("d/", 2000)
	tree := filepath.Join(workDir(t), "tree")
	mustUnpack(t, mustTar(t, registrytest.File("d/.wh..wh..opq", ""), registrytest.File(deep+".wh.gone", "")), tree)
	if entries, err := os.ReadDir(filepath.Join(tree, deep)); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v, want one whiteout", entries, err)
	}
}

// endless repeats data.
type endless struct {
	data []byte
	left []byte
}

func (e *endless) Read(to []byte) (int, error) {
	if len(e.left) == 0 {
		e.left = e.data
	}
	n := copy(to, e.left)
	e.left = e.left[n:]
	return n, nil
}

// TestUnpackEndsWithItsContext: archive/tar reads extended headers without end before it returns an entry, and makes up the holes of
// a sparse file without reading anything.
func TestUnpackEndsWithItsContext(t *testing.T) {
	var buffer bytes.Buffer
	writer := tar.NewWriter(&buffer)
	must(t, writer.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "f", Format: tar.FormatPAX, PAXRecords: map[string]string{
		"comment": strings.Repeat("x", 4096),
	}}))
	// The extended header alone: its header, and its content in whole blocks.
	extended := buffer.Bytes()[:buffer.Len()-512]

	// The writer knows no sparse files. Extended headers have no checksum of their content.
	sparse := bytes.ReplaceAll(mustTar(t, registrytest.Entry{Header: tar.Header{
		Typeflag: tar.TypeReg, Name: "hole", Mode: 0o644, PAXRecords: map[string]string{
			"gnu.sparse.size": fmt.Sprint(int64(1 << 50)), "gnu.sparse.numblocks": "0", "gnu.sparse.map": "",
			"gnu.sparse.major": "0", "gnu.sparse.minor": "1",
		},
	}}), []byte("gnu.sparse"), []byte("GNU.sparse"))
	for name, from := range map[string]io.Reader{"headers": &endless{data: extended}, "hole": bytes.NewReader(sparse)} {
		t.Run(name, func(t *testing.T) {
			work := workDir(t)
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			_, err := unpack.Tar(ctx, from, filepath.Join(work, "tree"), t.TempDir(), unpack.Limits{})
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v, want %v", err, context.DeadlineExceeded)
			}
		})
	}
	tree := filepath.Join(workDir(t), "tree")
	_, err := unpack.Tar(t.Context(), &endless{data: extended}, tree, t.TempDir(), unpack.Limits{MaxBytes: 1 << 20})
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("%v, want ResourceExhausted", err)
	}
}

// TestLimits checks the error of each limit.
func TestLimits(t *testing.T) {
	many := []registrytest.Entry{}
	for i := range 50 {
		many = append(many, registrytest.File(fmt.Sprint(i), "x"))
	}
	zeros := registrytest.File("zeros", strings.Repeat("\x00", 10<<20))
	for name, c := range map[string]struct {
		limits  unpack.Limits
		entries []registrytest.Entry
		word    string
	}{
		"bytes":   {unpack.Limits{MaxBytes: 1 << 20}, []registrytest.Entry{zeros}, "--max-layer-size"},
		"entries": {unpack.Limits{MaxEntries: 49}, many, "--max-layer-entries"},
		"reserve": {unpack.Limits{MinFreePercent: 101}, many, "--min-free-disk-percent"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := unpackTar(t, mustTar(t, c.entries...), filepath.Join(workDir(t), "tree"), c.limits)
			wantError(t, err, c.word)
			if !errdefs.IsResourceExhausted(err) {
				t.Errorf("the error is of another kind: %v", err)
			}
		})
	}
}

// workDir returns a directory on a file system that supports layers.
func workDir(t *testing.T) string {
	t.Helper()
	needs.Root(t)
	dir, remove, err := drivertest.WorkDir()
	must(t, err)
	t.Cleanup(func() { must(t, remove()) })
	return dir
}

func unpackTar(t *testing.T, data []byte, tree string, limits unpack.Limits) (unpack.Result, error) {
	t.Helper()
	scratch := filepath.Join(filepath.Dir(tree), filepath.Base(tree)+"-scratch")
	must(t, os.Mkdir(scratch, 0o700))
	defer func() { must(t, os.RemoveAll(scratch)) }()
	result, err := unpack.Tar(t.Context(), bytes.NewReader(data), tree, scratch, limits)
	compareImage(t, data, tree, limits, result, err)
	return result, err
}

func mustUnpack(t *testing.T, data []byte, tree string) unpack.Result {
	t.Helper()
	result, err := unpackTar(t, data, tree, unpack.Limits{})
	must(t, err)
	return result
}

func mustTar(t *testing.T, entries ...registrytest.Entry) []byte {
	t.Helper()
	data, err := registrytest.Tar(entries...)
	must(t, err)
	return data
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", words)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the error %q does not contain %q", err, word)
		}
	}
}

func wantFile(t *testing.T, path, want string) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	} else if string(got) != want {
		t.Errorf("%s has %q instead of %q", path, got, want)
	}
}
