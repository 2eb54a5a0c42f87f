package squash

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/viewtest"
)

// disk mounts a new file system. It skips the test if the tools are not installed.
func disk(t testing.TB, mkfs ...string) string {
	t.Helper()
	needs.Root(t)
	needs.Installed(t, mkfs[0])
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, 400<<20))
	run(t, mkfs[0], append(mkfs[1:], image)...)
	mounted := filepath.Join(dir, "m")
	must(t, os.Mkdir(mounted, 0o755))
	run(t, "mount", "-o", "loop,noatime", image, mounted)
	t.Cleanup(func() { must(t, unix.Unmount(mounted, 0)) })
	return mounted
}

func run(t testing.TB, program string, arguments ...string) {
	t.Helper()
	if output, err := exec.Command(program, arguments...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", program, arguments, err, output)
	}
}

// TestMergeOnDisks merges on file systems that share blocks, and on one that does neither that nor takes links.
func TestMergeOnDisks(t *testing.T) {
	for name, mkfs := range map[string][]string{
		"ext4": {"mkfs.ext4", "-q"}, "xfs": {"mkfs.xfs", "-q", "-m", "reflink=1"}, "btrfs": {"mkfs.btrfs", "-q"},
	} {
		t.Run(name, func(t *testing.T) {
			base := disk(t, mkfs...)
			for seed := uint64(1 << 20); seed < 1<<20+8; seed++ {
				dir := filepath.Join(base, fmt.Sprint(seed))
				must(t, os.Mkdir(dir, 0o755))
				checkChain(t, viewtest.NewChain(t, dir, seed))
			}
		})
	}
}

// sparse makes an upper with a file that has a hole of 64 MiB and a link, and a directory with an attribute.
func sparse(t *testing.T, upper string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Join(upper, "d"), 0o755))
	file, err := os.Create(filepath.Join(upper, "d/f"))
	must(t, err)
	defer file.Close()
	_, err = file.WriteAt(make([]byte, 1<<20), 0)
	must(t, err)
	_, err = file.WriteAt([]byte("end"), 64<<20)
	must(t, err)
	must(t, os.Link(filepath.Join(upper, "d/f"), filepath.Join(upper, "g")))
}

func statOf(t *testing.T, path string) linux.Stat {
	t.Helper()
	stat, err := linux.Fstatat(nil, path)
	must(t, err)
	return stat
}

// TestMergeCopies checks that files are copied with their holes and links where they cannot be linked, and linked where they can.
func TestMergeCopies(t *testing.T) {
	btrfs := disk(t, "mkfs.btrfs", "-q")
	plain := disk(t, "mkfs.ext4", "-q")
	for name, test := range map[string]struct {
		base   string
		merge  mergeFunc
		make   func(t *testing.T, upper string)
		linked bool
	}{
		"link":  {plain, Merge, func(t *testing.T, upper string) { must(t, os.Mkdir(upper, 0o755)) }, true},
		"apart": {plain + "/apart", MergeApart, func(t *testing.T, upper string) { must(t, os.MkdirAll(upper, 0o755)) }, false},
		// A directory of another project (project quotas) does not take links either.
		"subvolume": {btrfs, Merge, func(t *testing.T, upper string) {
			run(t, "btrfs", "subvolume", "create", upper)
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			upper, merged := filepath.Join(test.base, "u"), filepath.Join(test.base, "m")
			test.make(t, upper)
			sparse(t, upper)
			before := statOf(t, upper+"/g")
			must(t, mergePaths(t, test.merge, []string{upper}, merged))
			file, link := statOf(t, merged+"/d/f"), statOf(t, merged+"/g")
			if file.ID() != link.ID() || file.Size != before.Size || file.Blocks > 3<<11 {
				t.Errorf("files %v and %v of %d bytes, %d blocks", file.ID(), link.ID(), file.Size, file.Blocks)
			}
			if isLinked := file.Ino == before.Ino && file.Dev == before.Dev; isLinked != test.linked {
				t.Errorf("linked: %t, want %t", isLinked, test.linked)
			}
			after := statOf(t, upper+"/g")
			if !test.linked && (after.Nlink != before.Nlink || after.Ctim != before.Ctim || after.Atim != before.Atim) {
				t.Error("the file of the upper was changed")
			}
			names, err := os.ReadDir(merged)
			must(t, err)
			if len(names) != 2 {
				t.Errorf("names %v are left", names)
			}
		})
	}
}

// TestMergeDeep merges trees that are as deep as programs can make them by a path, and deeper than what is merged.
func TestMergeDeep(t *testing.T) {
	base := memory(t)
	for _, test := range []struct {
		levels, uppers int
		refused        bool
	}{{2000, 2, false}, {maxOpen, 1, true}} {
		var uppers []string
		for i := range test.uppers {
			upper := filepath.Join(base, fmt.Sprintf("u%d-%d", test.levels, i))
			must(t, os.Mkdir(upper, 0o755))
			deepen(t, upper, test.levels, strconv.Itoa(i))
			uppers = append(uppers, upper)
		}
		merged := filepath.Join(base, fmt.Sprintf("m%d", test.levels))
		err := mergePaths(t, Merge, uppers, merged)
		if errdefs.IsResourceExhausted(err) != test.refused || !test.refused && err != nil {
			t.Errorf("%d levels: %v", test.levels, err)
		}
		if test.refused {
			continue
		}
		for i := range test.uppers {
			path := merged + strings.Repeat("/d", test.levels) + "/" + strconv.Itoa(i)
			if len(path) < 4096 {
				statOf(t, path)
			}
		}
	}
}

// deepen makes levels of directories, with a file in the last one.
func deepen(t *testing.T, path string, levels int, name string) {
	t.Helper()
	dir, err := linux.OpenDir(path)
	must(t, err)
	for range levels {
		must(t, linux.Mkdirat(dir, "d", 0o755))
		next, err := linux.OpenNamed(dir, "d", "d")
		must(t, err)
		dir.Close()
		dir = next
	}
	must(t, linux.Mknodat(dir, name, unix.S_IFREG|0o644, 0))
	dir.Close()
}

// endsAfter is a context that ends after it was asked so many times.
type endsAfter struct {
	context.Context
	left *int
}

func (c endsAfter) Err() error {
	if *c.left--; *c.left < 0 {
		return context.Canceled
	}
	return nil
}

// TestMergeEnds checks that a merge ends with its context in the middle of a directory.
func TestMergeEnds(t *testing.T) {
	base := memory(t)
	upper, merged := filepath.Join(base, "u"), filepath.Join(base, "m")
	must(t, os.Mkdir(upper, 0o755))
	for i := range 100 {
		must(t, os.WriteFile(filepath.Join(upper, strconv.Itoa(i)), nil, 0o644))
	}
	left := 20
	err := mergePaths(t, func(ctx context.Context, uppers []*os.File, into *os.File) error {
		return Merge(endsAfter{ctx, &left}, uppers, into)
	}, []string{upper}, merged)
	names, readErr := os.ReadDir(merged)
	must(t, readErr)
	if !errors.Is(err, context.Canceled) || len(names) > 21 {
		t.Errorf("%d files were made, and the error is %v", len(names), err)
	}
}

// TestMergeRefuses checks what overlayfs does not show either.
func TestMergeRefuses(t *testing.T) {
	base := memory(t)
	for name, test := range map[string]struct {
		make  func(t *testing.T, upper string)
		wants error
	}{
		"metacopy without content": {func(t *testing.T, upper string) {
			must(t, os.Mkdir(upper+"/d", 0o755))
			must(t, unix.Setxattr(upper+"/d", opaqueXattr, []byte("y"), 0))
			must(t, os.WriteFile(upper+"/d/f", nil, 0o644))
			must(t, unix.Setxattr(upper+"/d/f", metacopyXattr, nil, 0))
		}, errdefs.ErrDataLoss},
		"redirect up": {func(t *testing.T, upper string) {
			must(t, os.Mkdir(upper+"/d", 0o755))
			must(t, unix.Setxattr(upper+"/d", redirectXattr, []byte("/a/../.."), 0))
		}, errdefs.ErrDataLoss},
		"relative redirect with a slash": {func(t *testing.T, upper string) {
			must(t, os.Mkdir(upper+"/d", 0o755))
			must(t, unix.Setxattr(upper+"/d", redirectXattr, []byte("a/b"), 0))
		}, errdefs.ErrDataLoss},
		"whiteouts by attribute": {func(t *testing.T, upper string) {
			must(t, os.Mkdir(upper+"/d", 0o755))
			must(t, unix.Setxattr(upper+"/d", opaqueXattr, []byte("x"), 0))
		}, errdefs.ErrFailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			upper := filepath.Join(base, name)
			must(t, os.Mkdir(upper, 0o755))
			test.make(t, upper)
			if err := mergePaths(t, Merge, []string{upper}, upper+".m"); !errors.Is(err, test.wants) {
				t.Errorf("the error is %v, want %v", err, test.wants)
			}
		})
	}
}

// FuzzMerge merges chains of any seed and length.
func FuzzMerge(f *testing.F) {
	base := memory(f)
	f.Add(uint64(1))
	f.Fuzz(func(t *testing.T, seed uint64) {
		dir, err := os.MkdirTemp(base, "c")
		must(t, err)
		defer func() { must(t, os.RemoveAll(dir)) }()
		checkChain(t, viewtest.NewChain(t, dir, seed))
	})
}

// BenchmarkMerge merges four uppers with 100,000 files.
func BenchmarkMerge(b *testing.B) {
	needs.Root(b)
	base := b.TempDir()
	const uppers, dirs, files = 4, 250, 100
	var paths []string
	for u := range uppers {
		upper := filepath.Join(base, fmt.Sprintf("u%d", u))
		for d := range dirs {
			dir := filepath.Join(upper, fmt.Sprintf("d%d", d))
			must(b, os.MkdirAll(dir, 0o755))
			for i := range files {
				must(b, os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%d-%d", u, i)), []byte("x"), 0o644))
			}
		}
		paths = append(paths, upper)
	}
	for name, merge := range map[string]mergeFunc{"link": Merge, "copy": MergeApart} {
		b.Run(name, func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				must(b, mergePaths(b, merge, paths, filepath.Join(base, fmt.Sprintf("%s%d", name, i))))
			}
			b.ReportMetric(float64(uppers*dirs*files)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
		})
	}
}
