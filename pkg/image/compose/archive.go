package compose

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// Open opens the blob of a layer.
type Open func(ctx context.Context, layer ocispec.Descriptor) (io.ReadCloser, error)

// WriteArchive writes an image as an OCI layout in a tar, which `docker load`, `ctr image import`, `skopeo` and archive:// read. open opens
// its layers, whose digests are verified. name is the name that the layout gives the image. It may be empty.
func WriteArchive(ctx context.Context, to io.Writer, made Image, name string, open Open) error {
	archive := archiveWriter{tar: tar.NewWriter(to), written: map[digest.Digest]bool{}}
	layout, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return fmt.Errorf("encode the layout: %w", err)
	}
	root := made.Manifest.Descriptor
	if name != "" {
		root.Annotations = map[string]string{ocispec.AnnotationRefName: name}
	}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{root},
	})
	if err != nil {
		return fmt.Errorf("encode the index of the layout: %w", err)
	}
	archive.file(ocispec.ImageLayoutFile, layout)
	archive.file(ocispec.ImageIndexFile, index)
	for _, document := range []Document{made.Manifest, made.Config} {
		archive.blob(document.Descriptor, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(document.Data)), nil })
	}
	for _, layer := range made.Layers {
		archive.blob(layer, func() (io.ReadCloser, error) { return open(ctx, layer) })
	}
	if archive.err != nil {
		return archive.err
	}
	if err := archive.tar.Close(); err != nil {
		return fmt.Errorf("write the archive: %w", err)
	}
	return nil
}

// archiveWriter writes entries until one fails.
type archiveWriter struct {
	tar *tar.Writer
	// written are the blobs that the archive has. An image may have a layer twice.
	written map[digest.Digest]bool
	err     error
}

func (a *archiveWriter) file(name string, data []byte) {
	if a.header(name, int64(len(data))) {
		_, a.err = a.tar.Write(data)
	}
}

func (a *archiveWriter) blob(descriptor ocispec.Descriptor, open func() (io.ReadCloser, error)) {
	id := descriptor.Digest
	if a.err != nil || a.written[id] {
		return
	}
	a.written[id] = true
	content, err := open()
	if err != nil {
		a.err = err
		return
	}
	if a.header(path.Join(ocispec.ImageBlobsDir, id.Algorithm().String(), id.Encoded()), descriptor.Size) {
		verified := image.NewVerifyingReader(image.LayerBlob{Descriptor: descriptor}, content)
		if _, err = io.Copy(a.tar, io.LimitReader(verified, descriptor.Size)); err == nil {
			err = verified.Verify()
		}
	}
	if err = errors.Join(err, content.Close()); err != nil && a.err == nil {
		a.err = fmt.Errorf("write blob %s into the archive: %w", id, err)
	}
}

// header writes the header of a file. It reports false if the archive cannot be written.
func (a *archiveWriter) header(name string, size int64) bool {
	if a.err == nil {
		a.err = a.tar.WriteHeader(&tar.Header{
			Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatPAX,
		})
	}
	return a.err == nil
}
