package main

import (
	"archive/tar"
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"

	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// prepare makes the image and starts a registry that has it.
func (b *bench) prepare() (stop func(), err error) {
	blobDir := filepath.Join(b.dir, "blobs")
	if err := os.MkdirAll(blobDir, 0o755); err != nil {
		return nil, err
	}
	var layers []v1.Layer
	var digests []string
	for i := range b.layers {
		path := filepath.Join(b.dir, fmt.Sprintf("layer-%d", i))
		if err := b.writeLayer(path, i); err != nil {
			return nil, err
		}
		mediaType := types.OCILayer
		if b.compression == "zstd" {
			mediaType = types.OCILayerZStd
		}
		layer, err := tarball.LayerFromFile(path, tarball.WithMediaType(mediaType))
		if err != nil {
			return nil, err
		}
		digest, err := layer.Digest()
		if err != nil {
			return nil, err
		}
		layers, digests = append(layers, layer), append(digests, digest.Hex)
	}
	image, err := registrytest.Image(layers...)
	if err != nil {
		return nil, err
	}
	if b.registry, err = registrytest.Start(registrytest.Options{BlobDir: blobDir}); err != nil {
		return nil, err
	}
	if b.image, err = b.registry.Push(context.Background(), "bench/image:1", image); err != nil {
		return nil, err
	}
	b.blobs, err = findBlobs(blobDir, digests)
	return b.registry.Close, err
}

// writeLayer writes a layer of files of many sizes that compress about as programs and texts do.
func (b *bench) writeLayer(path string, number int) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	buffered := bufio.NewWriterSize(file, 1<<20)
	var compressor io.WriteCloser = pgzip.NewWriter(buffered)
	if b.compression == "zstd" {
		if compressor, err = zstd.NewWriter(buffered); err != nil {
			return err
		}
	}
	random := rand.New(rand.NewPCG(1, uint64(number)))
	writer := tar.NewWriter(compressor)
	files, size := max(b.files/b.layers, 1), int64(b.megabytes)*1_000_000/int64(b.layers)
	mean := size / int64(files)
	content := &words{random: random}
	for i := range files {
		dir := fmt.Sprintf("usr/lib/layer-%d/dir-%d", number, i/50)
		if i%50 == 0 {
			header := &tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: time.Unix(1_700_000_000, 0)}
			if err := writer.WriteHeader(header); err != nil {
				return err
			}
		}
		// Most files are small, a few are large.
		length := mean / 2
		if i%20 == 0 {
			length = mean*20 - mean/2*19
		}
		if files == 1 {
			length = size
		}
		header := &tar.Header{
			Typeflag: tar.TypeReg,
			Name:     fmt.Sprintf("%s/file-%d", dir, i),
			Mode:     0o644,
			Size:     length,
			ModTime:  time.Unix(1_700_000_000, 0),
		}
		if err := writer.WriteHeader(header); err != nil {
			return err
		}
		if _, err := io.CopyN(writer, content, length); err != nil {
			return err
		}
	}
	for _, closing := range []func() error{writer.Close, compressor.Close, buffered.Flush} {
		if err := closing(); err != nil {
			return err
		}
	}
	return nil
}

// words is an endless text of random bytes and of words that come again.
type words struct {
	random *rand.Rand
	block  [4096]byte
	left   []byte
}

func (w *words) Read(buffer []byte) (int, error) {
	if len(w.left) == 0 {
		for i := 0; i < len(w.block); i += 8 {
			value := w.random.Uint64()
			if i%24 == 0 {
				copy(w.block[i:], fmt.Sprintf("%08x", value&0xffffffff))
				continue
			}
			copy(w.block[i:], "overlay "[:1+value%7])
			w.block[i+7] = byte(value >> 32)
		}
		w.left = w.block[:]
	}
	n := copy(buffer, w.left)
	w.left = w.left[n:]
	return n, nil
}
