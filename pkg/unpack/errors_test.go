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
	device := func(typeflag byte, major, minor int64) registrytest.Entry {
		return entry(tar.Header{Typeflag: typeflag, Name: "device", Devmajor: major, Devminor: minor, Format: tar.FormatGNU})
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
		// What mknod(2) takes of 32 bits would be a whiteout.
		"device 4096:0": {entries: []registrytest.Entry{device(tar.TypeChar, 4096, 0)}, words: []string{`"device"`, "4096:0"}},
		"device 0:1048576": {
			entries: []registrytest.Entry{device(tar.TypeChar, 0, 1<<20)}, words: []string{`"device"`, "0:1048576"},
		},
		"device 1:2^32+3": {
			entries: []registrytest.Entry{device(tar.TypeChar, 1, 1<<32+3)}, words: []string{`"device"`, "1:4294967299"},
		},
		"device below 0": {entries: []registrytest.Entry{device(tar.TypeBlock, -1, 0)}, words: []string{`"device"`, "-1:0"}},
		"owner over 32 bits": {
			entries: []registrytest.Entry{entry(tar.Header{Typeflag: tar.TypeReg, Name: "f", Uid: 1 << 32})}, words: []string{"4294967296:0"},
		},
		"group over 32 bits": {
			entries: []registrytest.Entry{entry(tar.Header{Typeflag: tar.TypeDir, Name: "f", Gid: 1 << 32})}, words: []string{"0:4294967296"},
		},
		"owner of a link": {
			entries: []registrytest.Entry{entry(tar.Header{Typeflag: tar.TypeSymlink, Name: "f", Linkname: "x", Uid: 1 << 32})},
			words:   []string{"4294967296:0"},
		},
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
