package linux

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

func openToWalk(t *testing.T, path string) *os.File {
	t.Helper()
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return dir
}

func TestWalk(t *testing.T) {
	path := t.TempDir()
	for _, dir := range []string{"a/b", "empty", "many"} {
		if err := os.MkdirAll(filepath.Join(path, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var want []string
	for i := range 2000 {
		want = append(want, fmt.Sprint("many/", strings.Repeat("n", 200), i))
	}
	for _, name := range append(want, "a/b/f", "top") {
		if err := os.WriteFile(filepath.Join(path, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("many", filepath.Join(path, "link")); err != nil {
		t.Fatal(err)
	}
	want = append(want, "a/b/f", "top", "link", "a/b", "a", "empty", "many", ".")
	slices.Sort(want)

	var got []string
	root := openToWalk(t, path)
	reread, err := Walk(t.Context(), root, func(dir *os.File, name string, _ Stat) error {
		at, err := CurrentPath(dir)
		if err != nil {
			return err
		}
		at, err = filepath.Rel(path, filepath.Join(at, name))
		if name == "" && !slices.ContainsFunc(got, func(beneath string) bool { return strings.HasPrefix(beneath, at+"/") }) &&
			at != "empty" && at != "." {
			t.Errorf("%s comes before what is in it", at)
		}
		got = append(got, at)
		return err
	})
	slices.Sort(got)
	if err != nil || reread || !slices.Equal(got, want) {
		t.Errorf("%d files, %t, %v, want %d", len(got), reread, err, len(want))
	}
}

// deepTree makes a tree of nested directories, each with two files beside the next one.
func deepTree(t *testing.T, levels int, name string) *os.File {
	t.Helper()
	root := openToWalk(t, t.TempDir())
	// The test's own clean-up would take a descriptor and a path for each level: take out one level after the other.
	t.Cleanup(func() {
		for {
			err := Renameat(root, name+"/"+name, root, "next", 0)
			for _, file := range []string{"a", "z"} {
				_ = Unlinkat(root, name+"/"+file)
			}
			if Rmdirat(root, name) != nil || err != nil {
				return
			}
			if err := Renameat(root, "next", root, name, 0); err != nil {
				t.Error(err)
				return
			}
		}
	})
	at := root
	for range levels {
		err := Mkdirat(at, name, 0o755)
		for _, file := range []string{name + "/a", name + "/z"} {
			err = errors.Join(err, Mknodat(at, file, 0o100644, 0))
		}
		next, openErr := OpenNamed(at, name, "deep")
		if err := errors.Join(err, openErr); err != nil {
			t.Fatal(err)
		}
		if at != root {
			at.Close()
		}
		at = next
	}
	at.Close()
	return root
}

// TestWalkOfDeepTree: the paths of this tree would take 800 MB, and their handles 2,500 descriptors.
func TestWalkOfDeepTree(t *testing.T) {
	const levels = 2500
	root := deepTree(t, levels, strings.Repeat("d", 255))
	heap := func() uint64 {
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return stats.HeapAlloc
	}
	before, most, descriptors, files, dirs := heap(), uint64(0), 0, 0, 0
	reread, err := Walk(t.Context(), root, func(_ *os.File, name string, _ Stat) error {
		if name != "" {
			files++
			return nil
		}
		if dirs == 0 {
			most = heap()
			open, err := os.ReadDir("/proc/self/fd")
			if err != nil {
				return err
			}
			descriptors = len(open)
		}
		dirs++
		return nil
	})
	if err != nil || !reread || files != 2*levels || dirs != levels+1 {
		t.Errorf("%d files, %d directories, %t, %v", files, dirs, reread, err)
	}
	if most > before+2<<20 || descriptors > walkOpen+20 {
		t.Errorf("%d bytes and %d descriptors at the deepest directory", most-before, descriptors)
	}
}

// TestWalkFindsNoWayBack moves a directory deep down out of the tree while the walk is in it.
func TestWalkFindsNoWayBack(t *testing.T) {
	root := deepTree(t, 200, "d")
	elsewhere := openToWalk(t, t.TempDir())
	moved := false
	_, err := Walk(t.Context(), root, func(dir *os.File, name string, _ Stat) error {
		at, err := CurrentPath(dir)
		if err != nil || moved || strings.Count(at, "/d") < 150 {
			return err
		}
		moved = true
		return Renameat(dir, "../../d", elsewhere, "away", 0)
	})
	if !moved || !errors.Is(err, ErrMoved) {
		t.Errorf("%v, want %v", err, ErrMoved)
	}
}

func TestWalkEnds(t *testing.T) {
	root := deepTree(t, 3, "d")
	ctx, cancel := context.WithCancel(t.Context())
	visited := 0
	_, err := Walk(ctx, root, func(*os.File, string, Stat) error {
		visited++
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) || visited != 1 {
		t.Errorf("%d files, %v", visited, err)
	}
	failed := errors.New("failed")
	if _, err := Walk(t.Context(), root, func(*os.File, string, Stat) error { return failed }); !errors.Is(err, failed) {
		t.Errorf("%v, want %v", err, failed)
	}
}
