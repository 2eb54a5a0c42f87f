package upper

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

func TestFilesWithManyNamesCountOnce(t *testing.T) {
	path := t.TempDir()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Mkdir(filepath.Join(path, "dir"), 0o755))
	before, err := countTree(t.Context(), path)
	check(err)
	name := func(dir string, i int) string { return filepath.Join(path, dir, strconv.Itoa(i)) }
	check(os.WriteFile(name("", 0), make([]byte, 64<<10), 0o644))
	check(os.WriteFile(name("", 1), make([]byte, 32<<10), 0o644))
	check(os.WriteFile(name("", 2), make([]byte, 16<<10), 0o644))
	check(os.Link(name("", 0), name("dir", 0)))
	check(os.Link(name("", 0), name("dir", 3)))
	check(os.Link(name("", 1), name("dir", 1)))
	one, err := countTree(t.Context(), path)
	check(err)
	if one.bytes-before.bytes < 112<<10 || one.bytes-before.bytes > 130<<10 || one.inodes-before.inodes != 3 {
		t.Errorf("three files take %d bytes and %d inodes", one.bytes-before.bytes, one.inodes-before.inodes)
	}

	const pairs = 20_000
	for i := 10; i < 10+pairs; i++ {
		check(os.Symlink("x", name("", i)))
		check(os.Link(name("", i), name("dir", i)))
	}
	many, err := countTree(t.Context(), path)
	check(err)
	if many.inodes-one.inodes != pairs {
		t.Errorf("%d pairs of names are %d inodes", pairs, many.inodes-one.inodes)
	}
}
