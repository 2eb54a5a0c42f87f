package store_test

import (
	"archive/tar"
	"os"
	"path/filepath"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestTarOfGit takes a tar of git archive, which begins with a PAX global header, as an archive and as a layer.
func TestTarOfGit(t *testing.T) {
	global := registrytest.Entry{Header: tar.Header{
		Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "e6acb02"},
	}}
	data := mustTar(t, global, registrytest.Dir("src"), registrytest.File("src/main.go", "x"))
	n := newNode(t)
	path := filepath.Join(t.TempDir(), "git.tar")
	must(t, os.WriteFile(path, data, 0o644))
	imported, err := n.importFile(path, "")
	must(t, err)
	defer imported.Release()
	wantFile(t, filepath.Join(imported.Dirs[0].Name(), "src/main.go"), "x")

	l, err := registrytest.LayerOf(data)
	must(t, err)
	r := n.startRegistry(registrytest.Options{})
	pulled, err := n.pull(push(t, r, "git:1", image(t, layer(t, registrytest.File("f", "x")), l)), "", registry.Credentials{})
	must(t, err)
	defer pulled.Release()
	wantFile(t, filepath.Join(pulled.Dirs[0].Name(), "src/main.go"), "x")
}
