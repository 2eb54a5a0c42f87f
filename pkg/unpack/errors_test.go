package unpack_test

import (
	"archive/tar"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestWrongLayersAreInvalid checks the error of each fault that a layer can have.
func TestWrongLayersAreInvalid(t *testing.T) {
	entry := func(header tar.Header) registrytest.Entry {
		header.Mode = 0o644
		return registrytest.Entry{Header: header}
	}
	hard := func(name, target string) registrytest.Entry {
		return entry(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target})
	}
	for name, c := range map[string]struct {
		entries []registrytest.Entry
		words   []string
	}{
		"hard link to a directory": {
			entries: []registrytest.Entry{registrytest.Dir("d"), hard("h", "d")}, words: []string{`"h"`, `"d"`, "is a directory"},
		},
		"hard link to a lower layer": {
			entries: []registrytest.Entry{hard("h", "usr/bin/tool")}, words: []string{`"h"`, `"usr/bin/tool"`, "not in this layer"},
		},
		"hard link to a file of a lower layer's directory": {
			entries: []registrytest.Entry{registrytest.Dir("usr"), hard("h", "usr/tool")}, words: []string{`"h"`, `"usr/tool"`, "not in this layer"},
		},
		"hard link to itself": {entries: []registrytest.Entry{hard("h", "h")}, words: []string{`"h"`, "not in this layer"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := unpackTar(t, mustTar(t, c.entries...), filepath.Join(workDir(t), "tree"), unpack.Limits{})
			wantError(t, err, c.words...)
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("the error is of another kind: %v", err)
			}
		})
	}
}
