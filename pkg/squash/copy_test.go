package squash

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/viewtest"
)

var anyRoom = Room{math.MaxInt64, math.MaxInt64}

func copyPath(ctx context.Context, t testing.TB, path, into string, room Room) error {
	t.Helper()
	must(t, os.Mkdir(into, 0o700))
	from, err := linux.OpenDir(path)
	must(t, err)
	defer from.Close()
	to, err := linux.OpenDir(into)
	must(t, err)
	defer to.Close()
	return CopyInUse(ctx, from, to, room)
}

// TestCopyInUseRandomChains copies every upper of each chain, and compares the views.
func TestCopyInUseRandomChains(t *testing.T) {
	base := memory(t)
	for seed := *firstSeed; seed < *firstSeed+*seeds; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			dir := filepath.Join(base, "c")
			must(t, os.Mkdir(dir, 0o755))
			defer func() { must(t, os.RemoveAll(dir)) }()
			chain := viewtest.NewChain(t, dir, seed)
			chain.Grow(t, 1+chain.IntN(5), 30)
			var copies []string
			for i, upper := range chain.Uppers {
				copies = append(copies, filepath.Join(dir, fmt.Sprint("copy", i)))
				must(t, copyPath(t.Context(), t, upper, copies[i], anyRoom))
			}
			view := filepath.Join(dir, "view")
			for what, layers := range map[string][]string{"layers": chain.Layers, "other layers": chain.NewLayers(t, "o")} {
				got := viewtest.Overlay{Lowers: slices.Concat(copies, layers), Metacopy: chain.Metacopy}.Show(t, view)
				want := viewtest.Overlay{Lowers: slices.Concat(chain.Uppers, layers), Metacopy: chain.Metacopy}.Show(t, view)
				viewtest.Compare(t, what, got, want)
			}
		})
	}
}

// TestCopyInUseUnderWriters copies an upper again and again while programs change it by the view. What each of them leaves at every moment
// is in every copy.
func TestCopyInUseUnderWriters(t *testing.T) {
	for name, base := range map[string]string{"memory": memory(t), "ext4": disk(t, "mkfs.ext4", "-q")} {
		t.Run(name, func(t *testing.T) { copyUnderWriters(t, base) })
	}
}

// hidden is how many directories there are below, and how many files in each.
const hidden = 300

func copyUnderWriters(t *testing.T, base string) {
	lower, upper, view := filepath.Join(base, "lower"), filepath.Join(base, "upper"), filepath.Join(base, "view")
	for _, dir := range []string{upper, view, upper + ".work", view + ".copy"} {
		must(t, os.MkdirAll(dir, 0o755))
	}
	for i := range hidden {
		dir := fmt.Sprintf("%s/removed/%d", lower, i)
		must(t, os.MkdirAll(dir, 0o755))
		for j := range 20 {
			must(t, os.WriteFile(fmt.Sprintf("%s/%d", dir, j), nil, 0o600))
		}
	}
	unmount, err := viewtest.Overlay{Lowers: []string{lower}, Upper: upper, Work: upper + ".work"}.Mount(view)
	must(t, err)
	defer func() { must(t, unmount()) }()
	must(t, os.MkdirAll(view+"/stable/dir", 0o755))
	for i := range 200 {
		must(t, os.WriteFile(fmt.Sprintf("%s/stable/dir/%d", view, i), []byte(strings.Repeat("s", i*100)), 0o600))
	}
	// The files below are deleted before the first copy.
	for i := range hidden {
		for j := range 20 {
			must(t, os.Remove(fmt.Sprintf("%s/removed/%d/%d", view, i, j)))
		}
	}
	stop := make(chan struct{})
	done := make(chan error)
	writers := []func(n int) error{
		// A file is replaced by another one as a whole.
		func(n int) error {
			digit := fmt.Sprint(n % 10)
			err := os.WriteFile(view+"/replaced.new", []byte(strings.Repeat(digit, 1+(n%10)*5000)), 0o600)
			return errors.Join(err, os.Rename(view+"/replaced.new", view+"/replaced"))
		},
		// A directory is removed with its whiteouts, and every other one made again.
		func(n int) error {
			if n >= hidden {
				return nil
			}
			name := fmt.Sprintf("%s/removed/%d", view, n)
			err := os.Remove(name)
			if n%2 == 0 {
				err = errors.Join(err, os.Mkdir(name, 0o755))
			}
			return err
		},
		// What has a name is a file, a directory or a link.
		func(n int) error {
			name := view + "/kind"
			if err := os.RemoveAll(name); err != nil {
				return err
			}
			switch n % 3 {
			case 0:
				return os.WriteFile(name, []byte("kind"), 0o600)
			case 1:
				return os.MkdirAll(name+"/a/b", 0o755)
			}
			return os.Symlink("stable", name)
		},
		// Files with several names, whose inodes are used again.
		func(n int) error {
			first, second := view+"/link", view+"/link2"
			err := errors.Join(os.RemoveAll(first), os.RemoveAll(second), os.WriteFile(first, []byte("link"), 0o600))
			return errors.Join(err, os.Link(first, second))
		},
		// A file that grows and is cut.
		func(n int) error {
			log, err := os.OpenFile(view+"/log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			_, err = log.WriteString(strings.Repeat("l", 10000))
			if n%50 == 49 {
				err = errors.Join(err, log.Truncate(10))
			}
			return errors.Join(err, log.Close())
		},
	}
	for _, write := range writers {
		must(t, write(0))
		go func() {
			var err error
			for n := 1; err == nil; n++ {
				select {
				case <-stop:
					done <- nil
					return
				default:
					err = write(n)
				}
			}
			done <- err
		}()
	}
	copies := 0
	for ; copies < 25 && !t.Failed(); copies++ {
		path := filepath.Join(base, "copy")
		err := copyPath(t.Context(), t, upper, path, anyRoom)
		if err != nil && !errdefs.IsUnavailable(err) {
			t.Error(err)
		}
		if err == nil {
			checkCopy(t, lower, path, view+".copy")
		}
		must(t, os.RemoveAll(path))
	}
	close(stop)
	for range writers {
		must(t, <-done)
	}
}

// checkCopy checks a view of a copy.
func checkCopy(t *testing.T, lower, path, target string) {
	t.Helper()
	unmount, err := viewtest.Overlay{Lowers: []string{path, lower}}.Mount(target)
	must(t, err)
	defer func() { must(t, unmount()) }()
	for i := range 200 {
		got, err := os.ReadFile(fmt.Sprintf("%s/stable/dir/%d", target, i))
		if err != nil || string(got) != strings.Repeat("s", i*100) {
			t.Fatalf("a file that nobody changed: %d bytes, %v", len(got), err)
		}
	}
	replaced, err := os.ReadFile(target + "/replaced")
	if err == nil {
		digit := int(replaced[0] - '0')
		if string(replaced) != strings.Repeat(string(replaced[:1]), 1+digit*5000) {
			t.Errorf("a file that was replaced as a whole is torn: %d bytes that begin with %d", len(replaced), digit)
		}
	} else if !os.IsNotExist(err) {
		t.Error(err)
	}
	for _, name := range []string{"link", "link2", "kind"} {
		content, err := os.ReadFile(target + "/" + name)
		if err == nil && len(content) > 0 && string(content) != name[:4] {
			t.Errorf("%s has %.40q", name, content)
		}
	}
	log, err := os.ReadFile(target + "/log")
	if err != nil || strings.Trim(string(log), "l\x00") != "" {
		t.Errorf("the log: %d bytes, %v", len(log), err)
	}
	if again, err := filepath.Glob(target + "/removed/*/*"); err != nil || len(again) > 0 {
		t.Errorf("there again, and deleted before the copy: %v, %v", again, err)
	}
	if left, err := filepath.Glob(path + "/.merge-*"); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestCopyInUseRefuses ends a copy that takes too much, or that nobody waits for.
func TestCopyInUseRefuses(t *testing.T) {
	base := memory(t)
	upper := filepath.Join(base, "u")
	must(t, os.MkdirAll(upper+"/dir", 0o755))
	must(t, os.WriteFile(upper+"/dir/file", make([]byte, 1<<20), 0o600))
	canceled, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("nobody waits")
	cancel(reason)
	for name, c := range map[string]struct {
		ctx  context.Context
		room Room
		want error
	}{
		"bytes":    {t.Context(), Room{1 << 19, 10}, errdefs.ErrUnavailable},
		"inodes":   {t.Context(), Room{1 << 30, 1}, errdefs.ErrUnavailable},
		"canceled": {canceled, anyRoom, reason},
	} {
		t.Run(name, func(t *testing.T) {
			if err := copyPath(c.ctx, t, upper, filepath.Join(base, name), c.room); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	must(t, copyPath(t.Context(), t, upper, filepath.Join(base, "enough"), Room{2 << 20, 2}))
	deep := filepath.Join(base, "deep")
	must(t, os.Mkdir(deep, 0o755))
	deepen(t, deep, maxOpen/2+1, "d")
	if err := copyPath(t.Context(), t, deep, filepath.Join(base, "copy"), anyRoom); !errdefs.IsResourceExhausted(err) {
		t.Errorf("got %v for a tree that is too deep", err)
	}
}

// TestCopyInUseOfFileThatIsFilled: a pod fills the holes of a file before the copy comes to them, and may make others behind it, so that a
// small quota is enough. The copy takes no more than its room.
func TestCopyInUseOfFileThatIsFilled(t *testing.T) {
	const room, size = 1 << 20, 64 << 20
	base := memory(t)
	file, err := os.Create(filepath.Join(base, "file"))
	must(t, err)
	defer file.Close()
	must(t, file.Truncate(size))
	// As the copier finds it. What follows is what it would copy afterwards.
	stat, err := linux.StatFile(file)
	must(t, err)
	for offset := int64(0); offset < size; offset += 2 << 20 {
		_, err := file.WriteAt(make([]byte, 1<<20), offset)
		must(t, err)
	}
	made, err := os.Create(filepath.Join(base, "made"))
	must(t, err)
	defer made.Close()
	c := &copier{files: files{noClones: []bool{true}}, left: Room{Bytes: room, Inodes: 1}}
	if err := c.copyContent(t.Context(), file, made, stat); !errdefs.IsUnavailable(err) {
		t.Errorf("the error is %v", err)
	}
	copied, err := linux.StatFile(made)
	must(t, err)
	if copied.DiskBytes() > 2*room {
		t.Errorf("it has copied %d bytes, and there is room for %d", copied.DiskBytes(), room)
	}
}
