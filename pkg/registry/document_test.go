package registry

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// newDocumentServer returns a repository whose registry sends content, and the descriptor of that.
func newDocumentServer(t *testing.T, config Config, content []byte) (*Repository, ocispec.Descriptor) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(content) }))
	t.Cleanup(server.Close)
	named, err := ParseName(strings.TrimPrefix(server.URL, "http://") + "/team/data:1")
	must(t, err)
	config.StallTimeout = 10 * time.Second
	return NewClient(config).Repository(named, Credentials{}), ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(content), Size: int64(len(content)),
	}
}

// TestLargeDocumentOnAFullDisk fetches documents for which the disk has no room. They take memory, which is bounded.
func TestLargeDocumentOnAFullDisk(t *testing.T) {
	needs.Root(t)
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=12m"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	for name, c := range map[string]struct {
		dir     string
		taken   int64
		reserve int
		inFile  bool
	}{
		"room":                 {dir, 0, 5, true},
		"full":                 {dir, 11 << 20, 0, false},
		"into the reserve":     {dir, 0, 50, false},
		"no directory at all":  {dir + "/none", 0, 0, false},
		"no file may be there": {"/proc", 0, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			file, err := os.CreateTemp(dir, "")
			must(t, err)
			defer func() { must(t, errors.Join(file.Close(), os.Remove(file.Name()))) }()
			must(t, unix.Fallocate(int(file.Fd()), 0, 0, max(c.taken, 1)))
			content := bytes.Repeat([]byte("x"), image.MaxDocumentSize)
			repository, descriptor := newDocumentServer(t, Config{SpoolDir: c.dir, SpoolReserve: c.reserve}, content)
			first, err := repository.Fetch(t.Context(), descriptor)
			must(t, err)
			defer first.Close()
			if _, inFile := first.(largeDocument); inFile != c.inFile {
				t.Errorf("the document is a %T", first)
			}
			if got, err := io.ReadAll(first); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes were read: %v", len(got), err)
			}
			if c.inFile {
				return
			}
			second, err := repository.Fetch(t.Context(), descriptor)
			must(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			_, err = repository.Fetch(ctx, descriptor)
			if known := (*Error)(nil); !errdefs.IsUnavailable(err) || errors.As(err, &known) {
				t.Errorf("a third document: %v; want Unavailable, and not of the registry", err)
			}
			must(t, second.Close())
			third, err := repository.Fetch(t.Context(), descriptor)
			must(t, err)
			must(t, third.Close())
		})
	}
}

// TestDocumentThatCannotBeWritten: the disk fails, and the registry is not to blame.
func TestDocumentThatCannotBeWritten(t *testing.T) {
	repository, descriptor := newDocumentServer(t, Config{}, []byte("content"))
	readOnly, err := os.Open(os.DevNull)
	must(t, err)
	defer readOnly.Close()
	err = repository.fetchInto(t.Context(), largeDocument{readOnly}, descriptor)
	if known := (*Error)(nil); !errors.Is(err, syscall.EBADF) || !errdefs.IsUnavailable(err) || errors.As(err, &known) {
		t.Errorf("%v; want EBADF, and not of the registry", err)
	}
}

// TestDeletedFile: a file system without O_TMPFILE has a file whose name was deleted.
func TestDeletedFile(t *testing.T) {
	dir := t.TempDir()
	file, err := createDeleted(dir)
	must(t, err)
	defer file.Close()
	if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
		t.Errorf("%v are left: %v", names, err)
	}
	if _, err := file.WriteString("content"); err != nil {
		t.Error(err)
	}
}
