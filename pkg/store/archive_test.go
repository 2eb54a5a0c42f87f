package store_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"

	ociimage "github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

func (n *node) importFile(path string, wanted digest.Digest) (*store.Lease, error) {
	n.t.Helper()
	file, err := os.Open(path)
	must(n.t, err)
	return n.Import(n.t.Context(), "archive://root/"+filepath.Base(path), file, wanted)
}

// archives writes an image in each supported format. It returns the paths by format.
func archives(t *testing.T, dir string, img v1.Image) map[string]string {
	t.Helper()
	tag, err := name.NewTag("example.com/a:1")
	must(t, err)
	docker := filepath.Join(dir, "docker.tar")
	must(t, tarball.WriteToFile(docker, tag, img))
	layoutDir := filepath.Join(dir, "layout")
	at, err := layout.Write(layoutDir, empty.Index)
	must(t, err)
	must(t, at.AppendImage(img))
	oci := filepath.Join(dir, "oci.tar")
	run(t, "tar", "-cf", oci, "-C", layoutDir, ".")
	paths := map[string]string{"docker archive": docker, "OCI layout": layoutDir, "OCI archive": oci}
	for _, name := range []string{"docker", "oci"} {
		data, err := os.ReadFile(filepath.Join(dir, name+".tar"))
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, name+".tar.gz"), registrytest.Gzip(data), 0o644))
		must(t, os.WriteFile(filepath.Join(dir, name+".tar.zst"), registrytest.Zstd(data), 0o644))
		paths[name+" archive in gzip"] = filepath.Join(dir, name+".tar.gz")
		paths[name+" archive in zstd"] = filepath.Join(dir, name+".tar.zst")
	}
	return paths
}

// dockerArchives writes an image in the forms of tools that write manifest.json. It returns the paths by form.
func dockerArchives(t *testing.T, dir string, img v1.Image) map[string]string {
	t.Helper()
	config, err := img.RawConfigFile()
	must(t, err)
	layers, err := img.Layers()
	must(t, err)
	paths := map[string]string{}
	for form, names := range map[string]struct {
		config, layer string
		before        []registrytest.Entry
	}{
		"Jib":       {config: "config.json", layer: "%s.tar.gz"},
		"rules_oci": {config: "blobs/sha256/" + digest.FromBytes(config).Encoded(), layer: "blobs/sha256/%s.tar.gz"},
		"any name":  {config: "image.json", layer: "layers/layer of %s"},
		"Docker 25": {config: "config.json", layer: "%s.tar.gz", before: []registrytest.Entry{
			registrytest.File("oci-layout", `{"imageLayoutVersion":"1.0.0"}`),
			registrytest.File("index.json", `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":null}`),
		}},
	} {
		entries := append(names.before, registrytest.File(names.config, string(config)))
		var files []string
		for _, l := range layers {
			blob, err := l.Compressed()
			must(t, err)
			data, err := io.ReadAll(blob)
			must(t, err)
			file := fmt.Sprintf(names.layer, mustHex(t, l))
			files = append(files, file)
			entries = append(entries, registrytest.File(file, string(data)))
		}
		manifest, err := json.Marshal([]map[string]any{{"Config": names.config, "RepoTags": []string{"a:1"}, "Layers": files}})
		must(t, err)
		data := mustTar(t, append(entries, registrytest.File("manifest.json", string(manifest)))...)
		paths[form] = filepath.Join(dir, strings.ReplaceAll(form, " ", "-")+".tar")
		must(t, os.WriteFile(paths[form], data, 0o644))
		paths[form+" in gzip"] = paths[form] + ".gz"
		must(t, os.WriteFile(paths[form+" in gzip"], registrytest.Gzip(data), 0o644))
	}
	return paths
}

// linkedArchives writes an image to OCI archives whose blobs are hard links and sparse files. It returns the paths by form.
func linkedArchives(t *testing.T, dir string, img v1.Image) map[string]string {
	t.Helper()
	layoutDir := filepath.Join(dir, "layout")
	at, err := layout.Write(layoutDir, empty.Index)
	must(t, err)
	must(t, at.AppendImage(img))
	sparse := filepath.Join(dir, "sparse")
	run(t, "cp", "-r", "--sparse=always", layoutDir, sparse)
	paths := map[string]string{"hard links": filepath.Join(dir, "links.tar")}
	for _, format := range []string{"gnu", "pax"} {
		path := filepath.Join(dir, format+".tar")
		paths["sparse blobs in format "+format] = path
		run(t, "tar", "--sparse", "--format="+format, "-cf", path, "-C", sparse, ".")
		if info, err := os.Stat(path); err != nil || info.Size() > 1<<20 {
			t.Fatalf("the archive is not sparse: %d bytes, %v", info.Size(), err)
		}
	}
	for _, blob := range mustGlob(t, filepath.Join(layoutDir, "blobs/sha256/*")) {
		must(t, os.Link(blob, filepath.Join(layoutDir, filepath.Base(blob)+".blob")))
	}
	links := mustGlob(t, filepath.Join(layoutDir, "*.blob"))
	args := []string{"-cf", paths["hard links"], "-C", layoutDir}
	for _, link := range links {
		args = append(args, filepath.Base(link))
	}
	run(t, "tar", append(args, "oci-layout", "index.json", "blobs")...)
	return paths
}

// TestImport imports an image from each supported format.
func TestImport(t *testing.T) {
	dir := t.TempDir()
	img := image(t,
		layer(t, registrytest.File("f", "bottom"), registrytest.File("g", "g")),
		layer(t, registrytest.File("f", "top"), registrytest.File(".wh.g", "")))
	paths := archives(t, dir, img)
	maps.Copy(paths, dockerArchives(t, dir, img))
	zeros, err := registrytest.LayerOf(mustTar(t, registrytest.File("f", "bottom"), registrytest.File("zeros", strings.Repeat("\x00", 4<<20))))
	must(t, err)
	maps.Copy(paths, linkedArchives(t, t.TempDir(), image(t, zeros, layer(t, registrytest.File("f", "top")))))
	for name, path := range paths {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			lease, err := n.importFile(path, "")
			must(t, err)
			defer lease.Release()
			if len(lease.Dirs) != 2 {
				t.Fatalf("%d layers", len(lease.Dirs))
			}
			wantFile(t, filepath.Join(lease.Dirs[0].Name(), "f"), "top")
			wantFile(t, filepath.Join(lease.Dirs[1].Name(), "f"), "bottom")
			again, err := n.importFile(path, lease.Image.Digest)
			must(t, err)
			again.Release()
			if left := mustGlob(t, filepath.Join(n.dir, "layers/incoming/*")); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// TestImportOfRootFileSystems imports tars of root file systems. Some have file names of image archives.
func TestImportOfRootFileSystems(t *testing.T) {
	data := mustTar(t, registrytest.Dir("etc"), registrytest.File("etc/hostname", "x"), registrytest.File("manifest.json", "[]"))
	id := strings.Repeat("a", 64)
	notOld := mustTar(t,
		registrytest.File(id+"/layer.tar", "x"), registrytest.File("repositories", "{}"), registrytest.File("etc/hostname", "x"))
	tricky := mustTar(t,
		registrytest.File("manifest.json", "[]"), registrytest.File("blobs/sha256/00", "x"), registrytest.File("etc/hostname", "x"))
	for name, content := range map[string][]byte{
		"plain":          data,
		"gzip":           registrytest.Gzip(data),
		"zstd":           registrytest.Zstd(data),
		"tricky":         tricky,
		"tricky in gzip": registrytest.Gzip(tricky),
		"repositories":   notOld,
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			path := filepath.Join(t.TempDir(), "rootfs.tar")
			must(t, os.WriteFile(path, content, 0o644))
			lease, err := n.importFile(path, "")
			must(t, err)
			wantFile(t, filepath.Join(lease.Dirs[0].Name(), "etc/hostname"), "x")
			want := digest.FromBytes(data)
			switch {
			case strings.HasPrefix(name, "tricky"):
				want = digest.FromBytes(tricky)
			case name == "repositories":
				want = digest.FromBytes(notOld)
			}
			if lease.Image.Digest != want {
				t.Errorf("digest %s instead of %s", lease.Image.Digest, want)
			}
			resolved := lease.Image.Digest
			lease.Release()
			n.restart()
			lease, err = n.importFile(path, resolved)
			must(t, err)
			lease.Release()
			// A volume refuses another file at the same path.
			must(t, os.WriteFile(path, mustTar(t, registrytest.File("other", "x")), 0o644))
			_, err = n.importFile(path, resolved)
			wantError(t, err, "was changed", resolved.String())
		})
	}
}

// TestImportRefuses checks the errors for invalid archives.
func TestImportRefuses(t *testing.T) {
	dir := t.TempDir()
	one, two := image(t, layer(t, registrytest.File("f", "1"))), image(t, layer(t, registrytest.File("f", "2")))
	tagOne, err := name.NewTag("a:1")
	must(t, err)
	tagTwo, err := name.NewTag("a:2")
	must(t, err)
	both := filepath.Join(dir, "both.tar")
	must(t, tarball.MultiWriteToFile(both, map[name.Tag]v1.Image{tagOne: one, tagTwo: two}))
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, data, 0o644))
		return path
	}
	must(t, os.Mkdir(filepath.Join(dir, "empty"), 0o755))
	whole := mustTar(t, registrytest.File("f", strings.Repeat("x", 100_000)))
	evil := mustTar(t, registrytest.File("manifest.json", `[{"Config":"../../etc/passwd","Layers":["/etc/passwd"]}]`))
	link := tar.Header{Typeflag: tar.TypeSymlink, Name: strings.Repeat("a", 64) + ".json", Linkname: "/etc/passwd"}
	escape := mustTar(t, registrytest.File("manifest.json", `[{"Config":"x.json","Layers":["x"]}]`), registrytest.Entry{Header: link})
	id := strings.Repeat("a", 64)
	old := mustTar(t, registrytest.Dir(id), registrytest.File(id+"/VERSION", "1.0"), registrytest.File(id+"/json", "{}"),
		registrytest.File(id+"/layer.tar", string(whole)), registrytest.File("repositories", `{"a":{"1":"`+id+`"}}`))
	for name, c := range map[string]struct {
		path  string
		words []string
	}{
		"docker save before 1.10":         {write("old.tar", old), []string{"invalid argument", "Docker 1.10", "manifest.json"}},
		"docker save before 1.10 in gzip": {write("old.tar.gz", registrytest.Gzip(old)), []string{"invalid argument", "Docker 1.10"}},
		"two images":                      {both, []string{"2 images"}},
		"empty file":                      {write("empty.tar", nil), []string{"too short"}},
		"no tar":                          {write("text", bytes.Repeat([]byte("no tar "), 1000)), []string{"tar"}},
		"truncated":                       {write("cut.tar", whole[:len(whole)/2]), []string{"unexpected EOF"}},
		"truncated gzip":                  {write("cut.tar.gz", registrytest.Gzip(whole)[:100]), []string{"EOF"}},
		"xz":                              {write("a.tar.xz", append([]byte{0xfd, '7', 'z', 'X', 'Z', 0}, whole...)), []string{"xz"}},
		"empty directory":                 {filepath.Join(dir, "empty"), []string{"index.json"}},
		"config that is not":              {write("evil.tar", evil), []string{"no file"}},
		"link out of archive":             {write("escape.tar", escape), []string{"no file"}},
		"missing layer": {write("missing.tar", mustTar(t,
			registrytest.File("config.json", `{"rootfs":{"diff_ids":["sha256:`+strings.Repeat("0", 64)+`"]}}`),
			registrytest.File("manifest.json", `[{"Config":"config.json","Layers":["layer one"]}]`))), []string{"no file", "layer one"}},
		"broken manifest.json": {write("broken.tar", mustTar(t, registrytest.File("manifest.json", `[{"Config":`))), []string{"manifest.json"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			_, err := n.importFile(c.path, "")
			wantError(t, err, c.words...)
			n.wantNothing(false)
		})
	}
}

// TestOneDigestIsOneImage has one document that is a manifest in a registry and a configuration in a docker archive, and a blob whose
// content is what identifies an archive.
func TestOneDigestIsOneImage(t *testing.T) {
	pulled, archived := image(t, layer(t, registrytest.File("f", "pulled"))), image(t, layer(t, registrytest.File("f", "archived")))
	manifest, err := pulled.RawManifest()
	must(t, err)
	config, err := archived.ConfigFile()
	must(t, err)
	fields := map[string]any{}
	must(t, json.Unmarshal(manifest, &fields))
	fields["rootfs"] = config.RootFS
	document, err := json.Marshal(fields)
	must(t, err)
	layers, err := archived.Layers()
	must(t, err)
	content, err := layers[0].Uncompressed()
	must(t, err)
	data, err := io.ReadAll(content)
	must(t, err)
	path := filepath.Join(t.TempDir(), "a.tar")
	configName, layerName := strings.Repeat("c", 64)+".json", strings.Repeat("d", 64)+"/layer.tar"
	must(t, os.WriteFile(path, mustTar(t, registrytest.File(configName, string(document)), registrytest.File(layerName, string(data)),
		registrytest.File("manifest.json", fmt.Sprintf(`[{"Config":%q,"Layers":[%q]}]`, configName, layerName))), 0o644))
	for _, order := range []string{"the archive first", "the registry first"} {
		t.Run(order, func(t *testing.T) {
			n := newNode(t)
			r := n.startRegistry(registrytest.Options{})
			push(t, r, "a:1", pulled)
			documents := documents{}
			id := documents.add(func() []byte { return document })
			r.SetFault(documents.serve)
			steps := []func() (*store.Lease, string, error){
				func() (*store.Lease, string, error) { l, err := n.importFile(path, ""); return l, "archived", err },
				func() (*store.Lease, string, error) {
					l, err := n.pull(r.Host+"/a@"+id.String(), "", registry.Credentials{})
					return l, "pulled", err
				},
			}
			if order == "the registry first" {
				slices.Reverse(steps)
			}
			lease, want, err := steps[0]()
			must(t, err)
			wantFile(t, filepath.Join(lease.Dirs[0].Name(), "f"), want)
			lease.Release()
			lease, want, err = steps[1]()
			if err == nil {
				defer lease.Release()
				wantFile(t, filepath.Join(lease.Dirs[0].Name(), "f"), want)
			}
			wantError(t, err, id.String(), "other content")
		})
	}
	t.Run("the key of an archive", func(t *testing.T) {
		n := newNode(t)
		r := n.startRegistry(registrytest.Options{})
		path := filepath.Join(t.TempDir(), "rootfs.tar")
		must(t, os.WriteFile(path, mustTar(t, registrytest.File("f", "archived")), 0o644))
		file, err := os.Open(path)
		must(t, err)
		defer file.Close()
		a, err := ociimage.IdentifyArchive("archive://root/rootfs.tar", file)
		must(t, err)
		key := fmt.Sprintf("%q %d %d %d %d", a.Reference, a.Device, a.Inode, a.Size, a.Modified.UnixNano())
		if digest.FromString(key) != a.Key() {
			t.Fatalf("%q has another digest than the archive's key", key)
		}
		artifact, err := registrytest.Artifact(registrytest.ArtifactFile{Data: []byte(key), MediaType: "application/vnd.example"})
		must(t, err)
		n.mustPull(push(t, r, "key:1", artifact))
		lease, err := n.importFile(path, "")
		must(t, err)
		defer lease.Release()
		wantFile(t, filepath.Join(lease.Dirs[0].Name(), "f"), "archived")
	})
}

// TestLayoutOfPlatforms imports a layout whose index.json has one manifest for each platform of an image.
func TestLayoutOfPlatforms(t *testing.T) {
	here := platforms.DefaultSpec()
	of := func(at layout.Path, name, content string, platform v1.Platform) {
		annotations := layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": name})
		must(t, at.AppendImage(image(t, layer(t, registrytest.File("f", content))), layout.WithPlatform(platform), annotations))
	}
	for name, second := range map[string]string{"one image": "a:1", "two images": "b:1"} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			dir := filepath.Join(t.TempDir(), "layout")
			at, err := layout.Write(dir, empty.Index)
			must(t, err)
			of(at, "a:1", "other", v1.Platform{OS: "linux", Architecture: "s390x"})
			of(at, second, "here", v1.Platform{OS: here.OS, Architecture: here.Architecture})
			lease, err := n.importFile(dir, "")
			if second != "a:1" {
				wantError(t, err, "2 images")
				return
			}
			must(t, err)
			wantFile(t, filepath.Join(lease.Dirs[0].Name(), "f"), "here")
			lease.Release()
		})
	}
}

// TestLayoutThatWasTamperedWith checks that a replaced blob of a layout is refused.
func TestLayoutThatWasTamperedWith(t *testing.T) {
	dir := t.TempDir()
	l := layer(t, registrytest.File("f", "x"))
	path := archives(t, dir, image(t, l))["OCI layout"]
	blob := filepath.Join(path, "blobs/sha256", mustHex(t, l))
	must(t, os.Remove(blob))
	must(t, os.Symlink("/etc/passwd", blob))
	n := newNode(t)
	_, err := n.importFile(path, "")
	wantError(t, err, "levels of symbolic links")
	must(t, os.Remove(blob))
	must(t, os.WriteFile(blob, registrytest.Gzip(mustTar(t, registrytest.File("evil", "x"))), 0o644))
	_, err = n.importFile(path, "")
	wantError(t, err, mustHex(t, l))
	n.wantNothing(false)
	if _, err := os.Stat(filepath.Join(n.dir, "images")); errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
