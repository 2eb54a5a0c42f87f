package commit_test

import (
	"bytes"
	"context"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	dockerref "github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/commit"
	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/image/compose"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
	"github.com/overlay-csi/overlay-csi/test/registrytest/distribution"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type fixture struct {
	registry  *registrytest.Registry
	committer *commit.Committer
}

func newFixture(t *testing.T) fixture {
	t.Helper()
	server, err := registrytest.Start(registrytest.Options{Handler: distribution.New(t.Context(), true)})
	must(t, err)
	t.Cleanup(server.Close)
	certs := filepath.Join(t.TempDir(), "certs.d")
	must(t, server.Configure(certs))
	client := registry.NewClient(registry.Config{CertsDir: certs, StallTimeout: time.Minute, Backoff: time.Millisecond})
	return fixture{server, commit.New(client, image.NewDocuments())}
}

// volume returns a volume with layers, to which a file was written.
func volume(t *testing.T, layers ...string) commit.Volume {
	t.Helper()
	content, err := registrytest.Tar(registrytest.File("new", "content"))
	must(t, err)
	v := commit.Volume{WriteTar: func(_ context.Context, to io.Writer) error {
		_, err := to.Write(content)
		return err
	}}
	for _, text := range layers {
		ref, err := reference.Parse(text)
		must(t, err)
		v.Layers = append(v.Layers, ref)
	}
	return v
}

// push pushes a volume as team/snapshots:1.
func (f fixture) push(t *testing.T, v commit.Volume) (string, error) {
	t.Helper()
	named, err := registry.ParseName(f.registry.Host + "/team/snapshots:1")
	must(t, err)
	var progress commit.Progress
	id, err := f.committer.Push(
		t.Context(), v, named.(dockerref.NamedTagged), registry.Credentials{}, compose.Details{Created: time.Unix(1_700_000_000, 0)}, &progress)
	if err == nil && progress.Sent.Load() != progress.Total.Load() {
		t.Errorf("%d of %d bytes were sent", progress.Sent.Load(), progress.Total.Load())
	}
	return id.String(), err
}

// pull pulls team/snapshots:1 with another client.
func (f fixture) pull(t *testing.T) v1.Image {
	t.Helper()
	ref, err := name.ParseReference(f.registry.Host+"/team/snapshots:1", name.Insecure)
	must(t, err)
	pulled, err := remote.Image(ref)
	must(t, err)
	must(t, validate.Image(pulled))
	return pulled
}

func TestPushOfAVolume(t *testing.T) {
	f := newFixture(t)
	base, err := registrytest.ImageOf(map[string]string{"a": "1"}, map[string]string{"b": "2"})
	must(t, err)
	baseRef, err := f.registry.Push(t.Context(), "team/base:1", base)
	must(t, err)
	artifact, err := registrytest.Artifact(registrytest.ArtifactFile{
		Data: []byte("x"), Annotations: map[string]string{"org.opencontainers.image.title": "x"},
	})
	must(t, err)
	artifactRef, err := f.registry.Push(t.Context(), "team/artifact:1", artifact)
	must(t, err)
	for name, c := range map[string]struct {
		volume commit.Volume
		layers int
		// below is the annotation with the layers that belong below.
		below string
	}{
		"one image":         {volume(t, "oci://"+baseRef), 3, ""},
		"directory":         {volume(t, "dir://models/base"), 1, "dir://models/base"},
		"images":            {volume(t, "oci://"+baseRef, "dir://models/base"), 1, "oci://" + baseRef + "\ndir://models/base"},
		"path in an image":  {volume(t, "oci://"+baseRef+"?path=/a"), 1, "oci://" + baseRef + "?path=%2Fa"},
		"artifact":          {volume(t, "oci://"+artifactRef), 1, "oci://" + artifactRef},
		"volume of the pod": {volume(t, "volume://data/x"), 1, "volume://data/x"},
	} {
		t.Run(name, func(t *testing.T) {
			id, err := f.push(t, c.volume)
			must(t, err)
			again, err := f.push(t, c.volume)
			must(t, err)
			pulled := f.pull(t)
			got, err := pulled.Digest()
			must(t, err)
			if got.String() != id || again != id {
				t.Errorf("Push returned %s and %s, and the registry has %s", id, again, got)
			}
			manifest, err := pulled.Manifest()
			must(t, err)
			if len(manifest.Layers) != c.layers || manifest.Annotations[compose.AnnotationLayers] != c.below {
				t.Errorf("there are %d layers, and below belongs %q", len(manifest.Layers), manifest.Annotations[compose.AnnotationLayers])
			}
		})
	}
}

// TestTagsAreResolved: what the tag of the base is later is another image.
func TestTagsAreResolved(t *testing.T) {
	f := newFixture(t)
	base, err := registrytest.ImageOf(map[string]string{"a": "1"})
	must(t, err)
	baseRef, err := f.registry.Push(t.Context(), "team/base:1", base)
	must(t, err)
	_, id, _ := strings.Cut(baseRef, "@")
	other, err := registrytest.ImageOf(map[string]string{"a": "2"})
	must(t, err)
	_, err = f.registry.Push(t.Context(), "team/base:1", other)
	must(t, err)
	for name, below := range map[string][]string{"complete": nil, "alone": {"dir://models/base"}} {
		t.Run(name, func(t *testing.T) {
			v := volume(t, append([]string{"oci://" + f.registry.Host + "/team/base:1"}, below...)...)
			v.Resolved = reference.Digests{v.Layers[0].String(): manifestDigest(t, base)}
			_, err := f.push(t, v)
			must(t, err)
			manifest, err := f.pull(t).Manifest()
			must(t, err)
			text := manifest.Annotations["org.opencontainers.image.base.digest"] + manifest.Annotations[compose.AnnotationLayers]
			if !strings.Contains(text, id) {
				t.Errorf("the annotations are %v, want %s", manifest.Annotations, id)
			}
		})
	}
}

func manifestDigest(t *testing.T, of v1.Image) digest.Digest {
	t.Helper()
	hash, err := of.Digest()
	must(t, err)
	return digest.Digest(hash.String())
}

func TestBaseIsGone(t *testing.T) {
	f := newFixture(t)
	read := false
	v := volume(t, "oci://"+f.registry.Host+"/team/gone@sha256:"+strings.Repeat("0", 64))
	v.WriteTar = func(context.Context, io.Writer) error {
		read = true
		return nil
	}
	_, err := f.push(t, v)
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "team/gone") || !strings.Contains(err.Error(), "gone from its registry") {
		t.Errorf("the error is %v", err)
	}
	if read {
		t.Error("the volume was read")
	}
}

func TestArchiveOfAVolume(t *testing.T) {
	f := newFixture(t)
	base, err := registrytest.ImageOf(map[string]string{"a": "1"}, map[string]string{"b": "2"})
	must(t, err)
	baseRef, err := f.registry.Push(t.Context(), "team/base:1", base)
	must(t, err)
	var archive, again bytes.Buffer
	for _, to := range []*bytes.Buffer{&archive, &again} {
		must(t, f.committer.WriteArchive(t.Context(), to, volume(t, "oci://"+baseRef), "team/app:1", registry.Credentials{}, compose.Details{}))
	}
	if !bytes.Equal(archive.Bytes(), again.Bytes()) {
		t.Error("the second archive differs")
	}
	if blobs := bytes.Count(archive.Bytes(), []byte("blobs/sha256/")); blobs != 5 {
		t.Errorf("there are %d blobs", blobs)
	}
}
