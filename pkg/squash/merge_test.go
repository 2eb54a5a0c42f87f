package squash

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/viewtest"
)

var (
	seeds     = flag.Uint64("seeds", 60, "number of random chains")
	firstSeed = flag.Uint64("seed", 1, "first seed of the random chains")
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// memory mounts a tmpfs.
func memory(t testing.TB) string {
	t.Helper()
	needs.Root(t)
	dir, err := os.MkdirTemp("", "squash")
	must(t, err)
	must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOATIME, "size=2g"))
	t.Cleanup(func() {
		must(t, unix.Unmount(dir, 0))
		must(t, os.Remove(dir))
	})
	return dir
}

type mergeFunc func(context.Context, []*os.File, *os.File) error

// mergePaths merges the uppers at these paths into a new directory.
func mergePaths(t testing.TB, merge mergeFunc, paths []string, into string) error {
	t.Helper()
	must(t, os.Mkdir(into, 0o700))
	var uppers []*os.File
	for _, path := range paths {
		upper, err := linux.OpenDir(path)
		must(t, err)
		defer upper.Close()
		uppers = append(uppers, upper)
	}
	dir, err := linux.OpenDir(into)
	must(t, err)
	defer dir.Close()
	return merge(t.Context(), uppers, dir)
}

// TestMergeRandomChains merges a run of uppers of each chain, and compares the views over the layers of the chain and over other ones.
func TestMergeRandomChains(t *testing.T) {
	base := memory(t)
	for seed := *firstSeed; seed < *firstSeed+*seeds; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			dir := filepath.Join(base, "c")
			must(t, os.Mkdir(dir, 0o755))
			defer func() { must(t, os.RemoveAll(dir)) }()
			checkChain(t, viewtest.NewChain(t, dir, seed))
		})
	}
}

func checkChain(t *testing.T, chain *viewtest.Chain) {
	chain.Grow(t, 2+chain.IntN(19), 30)
	merge := Merge
	if chain.IntN(2) == 0 {
		merge = MergeApart
	}
	from, to := 0, len(chain.Uppers)
	if chain.IntN(2) == 0 {
		from = chain.IntN(to - 1)
		to = from + 2 + chain.IntN(to-from-1)
	}
	merged := filepath.Join(chain.Dir, "m")
	must(t, mergePaths(t, merge, chain.Uppers[from:to], merged))
	uppers := slices.Concat(chain.Uppers[:from], []string{merged}, chain.Uppers[to:])
	view := filepath.Join(chain.Dir, "view")
	for what, layers := range map[string][]string{"layers": chain.Layers, "other layers": chain.NewLayers(t, "o")} {
		got := viewtest.Overlay{Lowers: slices.Concat(uppers, layers), Metacopy: chain.Metacopy}.Show(t, view)
		want := viewtest.Overlay{Lowers: slices.Concat(chain.Uppers, layers), Metacopy: chain.Metacopy}.Show(t, view)
		viewtest.Compare(t, fmt.Sprintf("uppers %d to %d of %d over %s", from, to, len(chain.Uppers), what), got, want)
	}
	if from == 0 || t.Failed() {
		return
	}
	// The topmost one is an upper again, as that of a volume.
	work := chain.Uppers[0] + ".work"
	got := viewtest.Overlay{
		Lowers: slices.Concat(uppers[1:], chain.Layers), Upper: uppers[0], Work: work, Metacopy: chain.Metacopy,
	}.Show(t, view)
	want := viewtest.Overlay{
		Lowers: slices.Concat(chain.Uppers[1:], chain.Layers), Upper: uppers[0], Work: work, Metacopy: chain.Metacopy,
	}.Show(t, view)
	viewtest.Compare(t, "an upper over it", got, want)
}
