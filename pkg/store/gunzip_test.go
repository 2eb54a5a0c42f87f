package store_test

import (
	"bufio"
	"fmt"
	"io"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/gunzip"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// failingGunzip decompresses in another process that fails.
type failingGunzip struct {
	err   error
	calls int
}

func (g *failingGunzip) open(*bufio.Reader, int64) io.ReadCloser {
	g.calls++
	return io.NopCloser(readerFunc(func([]byte) (int, error) { return 0, g.err }))
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(buffer []byte) (int, error) { return f(buffer) }

// TestGunzipRefused: what another process refuses is decompressed here, and is what it always was.
func TestGunzipRefused(t *testing.T) {
	refusing := &failingGunzip{err: fmt.Errorf("%w: test", gunzip.ErrRefused)}
	n := newNode(t, func(n *node) { n.config.Gunzip = refusing.open })
	r := n.startRegistry(registrytest.Options{})
	lease := n.mustPull(push(t, r, "refused:1", image(t, layer(t, registrytest.File("file", "content")))))
	defer lease.Release()
	wantFile(t, filepath.Join(linux.ProcPath(lease.Dirs[0]), "file"), "content")
	if refusing.calls != 1 {
		t.Errorf("%d calls", refusing.calls)
	}
}

// TestGunzipFails: a decompressor that hangs or dies is an error of the layer, and the next pull goes on with what was downloaded.
func TestGunzipFails(t *testing.T) {
	failing := &failingGunzip{err: fmt.Errorf("%w: it has died", errdefs.ErrUnavailable)}
	n := newNode(t, func(n *node) { n.config.Gunzip = failing.open })
	r := n.startRegistry(registrytest.Options{})
	name := push(t, r, "failing:1", image(t, layer(t, registrytest.File("file", "content"))))
	_, err := n.pull(name, "", registry.Credentials{})
	wantError(t, err, "it has died")
	if !errdefs.IsUnavailable(err) {
		t.Errorf("error %v", err)
	}
	failing.err = fmt.Errorf("%w: test", gunzip.ErrRefused)
	n.mustPull(name).Release()
}
