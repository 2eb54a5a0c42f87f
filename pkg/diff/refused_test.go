package diff_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/diff"
)

// TestRefused has what no image layer can carry. The error names the file.
func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		write func(view string) error
		// after changes the upper.
		after    func(upper string) error
		maxBytes int64
		want     []string
		is       func(error) bool
	}{
		"whiteout's name": {write: func(view string) error { return os.WriteFile(view+"/d/.wh.x", nil, 0o600) }, want: []string{`"d/.wh.x"`}},
		"in a moved directory": {
			write: func(view string) error { return os.Rename(view+"/hidden", view+"/moved") }, want: []string{`"moved/.wh.layer"`},
		},
		"whiteout of a whiteout's name": {
			write: func(view string) error { return os.Remove(view + "/hidden/.wh.layer") }, want: []string{`"hidden/.wh.layer"`},
		},
		"attribute of another overlay": {
			write: func(view string) error { return os.WriteFile(view+"/d/x", nil, 0o600) },
			after: func(upper string) error {
				return unix.Setxattr(upper+"/d/x", "trusted.overlay.overlay.opaque", []byte("y"), 0)
			},
			want: []string{`"d/x"`, "trusted.overlay.opaque"},
		},
		"attribute of an overlay without privileges": {
			write: func(view string) error {
				err := os.WriteFile(view+"/d/x", nil, 0o600)
				return errors.Join(err, unix.Setxattr(view+"/d/x", "user.overlay.origin", nil, 0))
			},
			want: []string{`"d/x"`, "user.overlay.origin"},
		},
		"attribute's name": {
			write: func(view string) error { return unix.Setxattr(view+"/d", "user.a=b", []byte("x"), 0) }, want: []string{`"d"`, "user.a=b"},
		},
		"too large": {
			write: func(view string) error {
				return errors.Join(os.WriteFile(view+"/a", []byte("12345"), 0o600), os.Truncate(view+"/d/one", 1<<43))
			},
			maxBytes: 1000, want: []string{`"d/one"`, "--max-layer-size"}, is: errdefs.IsResourceExhausted,
		},
		"too long a path": {
			write: func(view string) error {
				dir, err := os.Open(view)
				for range 20 {
					if err == nil {
						err = unix.Mkdirat(int(dir.Fd()), strings.Repeat("p", 250), 0o755)
					}
					if err == nil {
						var fd int
						fd, err = unix.Openat(int(dir.Fd()), strings.Repeat("p", 250), unix.O_RDONLY|unix.O_DIRECTORY, 0)
						dir.Close()
						dir = os.NewFile(uintptr(fd), "dir")
					}
				}
				return errors.Join(err, dir.Close())
			},
			want: []string{"ppp", "4095 bytes"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t)
			sh(t, s.layers[0], "mkdir d hidden; echo 1 >d/one; echo x >hidden/.wh.layer")
			s.write(func(view string) { must(t, c.write(view)) })
			if c.after != nil {
				must(t, c.after(s.uppers[0]))
			}
			tree := s.tree()
			tree.MaxBytes = c.maxBytes
			err := diff.WriteLayer(t.Context(), tree, io.Discard)
			is := c.is
			if is == nil {
				is = errdefs.IsFailedPrecondition
			}
			if !is(err) {
				t.Fatalf("error %v", err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q is not in %v", want, err)
				}
			}
			if len(err.Error()) > 1000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

// TestWalkOfLongPaths lists what it can, and says what is missing.
func TestWalkOfLongPaths(t *testing.T) {
	s := newStack(t)
	long := strings.Repeat("p", 250)
	s.write(func(view string) {
		sh(t, view, fmt.Sprintf("echo x >zzz; for i in $(seq 20); do mkdir %s; cd -P %s; done", long, long))
	})
	var paths []string
	err := diff.Walk(t.Context(), s.tree(), func(c diff.Change) error {
		paths = append(paths, c.Path)
		return nil
	})
	if !errdefs.IsFailedPrecondition(err) || len(paths) != 17 || paths[16] != "zzz" {
		t.Errorf("%d paths, the last of which is %.20s, and the error %v", len(paths), paths[len(paths)-1], err)
	}
}

// TestContext ends in the middle of a file that has no end.
func TestContext(t *testing.T) {
	s := newStack(t)
	s.write(func(view string) { sh(t, view, "truncate -s 8T x") })
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("the client has gone")
	err := diff.WriteLayer(ctx, s.tree(), writerFunc(func(data []byte) (int, error) {
		if len(data) > 4096 {
			cancel(gone)
		}
		return len(data), nil
	}))
	if !errors.Is(err, gone) {
		t.Error(err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(data []byte) (int, error) { return f(data) }

// TestNoLayers takes everything for new.
func TestNoLayers(t *testing.T) {
	s := newStack(t)
	s.write(func(view string) { sh(t, view, "mkdir d; echo 1 >d/one") })
	tree := s.tree()
	tree.Base = nil
	if got := strings.Join(s.changes(tree), ", "); got != "A ., A d, A d/one" {
		t.Error(got)
	}
	if data := s.layer(tree); !bytes.Equal(data, s.layer(s.tree())) {
		t.Error("the tar differs from the one over an empty layer")
	}
}

// TestManyAttributes has a directory with more attributes than a tar can carry, and than should be in memory.
func TestManyAttributes(t *testing.T) {
	s := newStack(t)
	sh(t, s.layers[0], "mkdir d")
	s.uppers = []string{s.mkdir("upper")}
	must(t, unix.Mount("tmpfs", s.uppers[0], "tmpfs", 0, "mode=755"))
	t.Cleanup(func() { must(t, unix.Unmount(s.uppers[0], unix.MNT_DETACH)) })
	must(t, os.Mkdir(s.uppers[0]+"/d", 0o755))
	value := make([]byte, 64<<10)
	for i := range 1000 {
		must(t, unix.Setxattr(s.uppers[0]+"/d", fmt.Sprint("trusted.", i), value, 0))
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if got := strings.Join(s.changes(s.tree()), ", "); got != "C d" {
		t.Errorf("changes: %s", got)
	}
	err := diff.WriteLayer(t.Context(), s.tree(), io.Discard)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), `"d"`) {
		t.Errorf("error %v", err)
	}
	if runtime.ReadMemStats(&after); after.TotalAlloc-before.TotalAlloc > 32<<20 {
		t.Errorf("it took %d MiB of memory", (after.TotalAlloc-before.TotalAlloc)>>20)
	}
}
