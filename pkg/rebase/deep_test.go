package rebase

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// makeDeep makes a directory in a directory in a directory, and a file in the last one.
func makeDeep(t testing.TB, root string, depth int, name, content string) {
	t.Helper()
	dir, err := linux.OpenDir(root)
	must(t, err)
	for range depth {
		must(t, linux.Mkdirat(dir, name, 0o755))
		next, err := linux.OpenDirAt(dir, name)
		must(t, err)
		dir.Close()
		dir = next
	}
	must(t, os.WriteFile(fmt.Sprintf("%s/file", linux.ProcPath(dir)), []byte(content), 0o600))
	dir.Close()
}

// TestFindInDeepTree: a pod chooses how long paths are. They are not kept for each level, and a conflict has the end of its path.
func TestFindInDeepTree(t *testing.T) {
	const depth = 1000
	dir := memory(t)
	name := strings.Repeat("n", 255)
	s := &stack{dir: dir}
	for what, into := range map[string]*[]string{"old": &s.old, "new": &s.new, "upper": &s.uppers} {
		path := filepath.Join(dir, what)
		must(t, os.Mkdir(path, 0o755))
		makeDeep(t, path, depth, name, what)
		*into = []string{path}
	}
	defer s.close()
	tree := s.tree(t)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	var paths []string
	_, err := Find(t.Context(), tree, Fail, func(c Conflict) error {
		paths = append(paths, c.Path)
		return nil
	})
	must(t, err)
	runtime.ReadMemStats(&after)
	if len(paths) != 1 || !strings.HasPrefix(paths[0], "…/n") || !strings.HasSuffix(paths[0], "n/file") || len(paths[0]) > 4099 {
		t.Errorf("the conflicts are at %.300q", paths)
	}
	// The paths of all levels together would have 128 MB.
	if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 64<<20 {
		t.Errorf("it has allocated %d MB", allocated>>20)
	}
}

// TestFindTooDeep refuses a tree that would take too many files.
func TestFindTooDeep(t *testing.T) {
	dir := memory(t)
	s := &stack{dir: dir}
	for what, into := range map[string]*[]string{"old": &s.old, "new": &s.new, "upper": &s.uppers} {
		path := filepath.Join(dir, what)
		must(t, os.Mkdir(path, 0o755))
		makeDeep(t, path, maxOpen/6+1, "n", what)
		*into = []string{path}
	}
	defer s.close()
	if _, err := Find(t.Context(), s.tree(t), Fail, nil); !errdefs.IsResourceExhausted(err) {
		t.Errorf("the error is %v", err)
	}
}
