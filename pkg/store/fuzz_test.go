package store

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/platforms"
	"golang.org/x/sys/unix"
)

// FuzzUnpack unpacks any tar beside a directory that nothing must be changed in.
func FuzzUnpack(f *testing.F) {
	for _, headers := range [][]tar.Header{
		{{Typeflag: tar.TypeReg, Name: "../outside/x"}, {Typeflag: tar.TypeDir, Name: "d"}},
		{{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "../../outside"}, {Typeflag: tar.TypeReg, Name: "l/x"}},
		{{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "/outside"}, {Typeflag: tar.TypeLink, Name: "h", Linkname: "l/file"}},
		{{Typeflag: tar.TypeReg, Name: "d/.wh..wh..opq"}, {Typeflag: tar.TypeReg, Name: "d/.wh.x"}, {Typeflag: tar.TypeReg, Name: ".wh..."}},
		{{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b", "SCHILY.xattr.trusted.overlay.redirect": "/"}}},
		{{Typeflag: tar.TypeChar, Name: "c"}, {Typeflag: tar.TypeFifo, Name: "p"}, {Typeflag: tar.TypeDir, Name: "c"}},
	} {
		var buffer bytes.Buffer
		writer := tar.NewWriter(&buffer)
		for _, header := range headers {
			if err := writer.WriteHeader(&header); err != nil {
				f.Fatal(err)
			}
		}
		if err := writer.Close(); err != nil {
			f.Fatal(err)
		}
		f.Add(buffer.Bytes())
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		outside := filepath.Join(dir, "outside")
		if err := os.Mkdir(outside, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(outside, "file"), []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
		before := look(t, outside)
		layer := filepath.Join(dir, "layer")
		if err := os.Mkdir(layer, 0o755); err != nil {
			t.Fatal(err)
		}
		u, err := newUnpacker(layer, Limits{LayerBytes: 1 << 20, LayerEntries: 1000})
		if err != nil {
			t.Fatal(err)
		}
		// What is wrong with the tar is not of interest.
		_ = u.unpack(t.Context(), bytes.NewReader(data))
		u.close()
		if after := look(t, outside); after != before {
			t.Errorf("%+v became %+v", before, after)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
			t.Errorf("there is more than the layer and what is outside: %v, %v", entries, err)
		}
		// The unpacker's own files, and a tree.
		if err := filepath.WalkDir(layer, func(path string, _ os.DirEntry, err error) error { return ignoreNotExist(err) }); err != nil {
			t.Error(err)
		}
	})
}

// seen is what a write to the directory, or to the file in it, would change.
type seen struct {
	dir, file unix.Timespec
	links     uint64
	mode      uint32
}

func look(t *testing.T, outside string) seen {
	var dir, file unix.Stat_t
	if err := unix.Stat(outside, &dir); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(filepath.Join(outside, "file"), &file); err != nil {
		t.Fatal(err)
	}
	return seen{dir.Ctim, file.Ctim, uint64(file.Nlink), file.Mode}
}

func FuzzManifest(f *testing.F) {
	for _, seed := range []string{
		`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","size":2},"layers":[{"digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","size":1}]}`,
		`{"schemaVersion":2,"manifests":[{"digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","size":1,"platform":{"os":"linux","architecture":"amd64"}}]}`,
		`{"schemaVersion":2,"config":{"mediaType":"x","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000"},"layers":[{"digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","annotations":{"org.opencontainers.image.title":"../.wh.x"}}]}`,
		`{"schemaVersion":1,"fsLayers":[{}]}`,
	} {
		f.Add([]byte(seed), []byte(`{"rootfs":{"diff_ids":["sha256:0000000000000000000000000000000000000000000000000000000000000000"]}}`))
	}
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		d, err := parseDocument(manifest)
		if err != nil {
			return
		}
		if len(d.Manifests) > 0 {
			_, _ = d.choose(platforms.Default())
			return
		}
		sources, err := d.sources(config)
		if err != nil {
			return
		}
		if len(sources) == 0 || len(sources) > maxLayers {
			t.Errorf("%d layers", len(sources))
		}
		for _, src := range sources {
			if src.descriptor.Digest.Validate() != nil || src.descriptor.Size < 0 || checkTitle(src.title) != nil {
				t.Errorf("%+v", src)
			}
			if name := buildName(src.key()); filepath.Base(name) != name {
				t.Errorf("%q would be the name of a directory", name)
			}
		}
	})
}

func FuzzDockerManifest(f *testing.F) {
	f.Add([]byte(`[{"Config":"x.json","Layers":["a/layer.tar"]}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		image, err := parseDockerManifest(data)
		if err == nil && (len(image.Layers) == 0 || len(image.Layers) > maxLayers) {
			t.Errorf("%d layers", len(image.Layers))
		}
	})
}

// FuzzHosts reads any hosts.toml, and whatever it says sends no credentials over plain HTTP where it does not say so.
func FuzzHosts(f *testing.F) {
	f.Add([]byte("server = \"https://example.com\"\n[host.\"http://mirror:5000\"]\n  capabilities = [\"pull\"]\n"))
	f.Add([]byte("[host.\"https://a\"]\n  skip_verify = true\n  dial_timeout = \"1s\"\n[host.\"https://a\".header]\n  x = \"y\"\n"))
	f.Add([]byte("ca = [\"/nowhere\"]\nclient = [[\"a\", \"b\"]]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "example.com"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "example.com", "hosts.toml"), data, 0o644); err != nil {
			t.Fatal(err)
		}
		hosts, err := NewRegistries(dir, "", "fuzz").hosts("example.com", func(string) (string, string, error) { return "", "", nil })
		if err != nil {
			return
		}
		for _, host := range hosts {
			if host.Client == nil || host.Authorizer == nil {
				t.Errorf("%+v", host)
			}
		}
	})
}

// FuzzDecompress reads whatever claims to be compressed.
func FuzzDecompress(f *testing.F) {
	f.Add([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0, 0, 0})
	f.Add([]byte{0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		reader, err := decompress(bytes.NewReader(data))
		if err != nil {
			return
		}
		defer reader.Close()
		_, _ = io.CopyN(io.Discard, reader, 16<<20)
		looksLikeTar(data)
	})
}
