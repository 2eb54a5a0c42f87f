package registrytest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"maps"
	"math/big"
	"net"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

// Entry is an entry of a tar. Content is for files.
type Entry struct {
	tar.Header
	Content string
}

// File is an entry for a file.
func File(name, content string) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: time.Unix(1_700_000_000, 0)}, content}
}

// Dir is an entry for a directory.
func Dir(name string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755, ModTime: time.Unix(1_700_000_000, 0)}}
}

// Tar is a tar of the entries.
func Tar(entries ...Entry) ([]byte, error) {
	var buffer bytes.Buffer
	writer := tar.NewWriter(&buffer)
	for _, entry := range entries {
		header := entry.Header
		if header.Typeflag == tar.TypeReg {
			header.Size = int64(len(entry.Content))
		}
		if header.Format == tar.FormatUnknown {
			header.Format = tar.FormatPAX
		}
		if err := writer.WriteHeader(&header); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(writer, entry.Content); err != nil {
			return nil, err
		}
	}
	err := writer.Close()
	return buffer.Bytes(), err
}

// Gzip compresses.
func Gzip(data []byte) []byte {
	var buffer bytes.Buffer
	writer, _ := gzip.NewWriterLevel(&buffer, gzip.BestSpeed)
	_, _ = writer.Write(data)
	_ = writer.Close()
	return buffer.Bytes()
}

// Zstd compresses.
func Zstd(data []byte) []byte {
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	defer encoder.Close()
	return encoder.EncodeAll(data, nil)
}

// Layer is a gzipped layer of these entries.
func Layer(entries ...Entry) (v1.Layer, error) {
	data, err := Tar(entries...)
	if err != nil {
		return nil, err
	}
	return LayerOf(Gzip(data))
}

// LayerOf is a layer of a tar, compressed or not.
func LayerOf(data []byte) (v1.Layer, error) {
	opener := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	if !bytes.HasPrefix(data, []byte{0x1f, 0x8b}) && !bytes.HasPrefix(data, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		return static.NewLayer(data, types.OCIUncompressedLayer), nil
	}
	mediaType := types.OCILayer
	if bytes.HasPrefix(data, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		mediaType = types.OCILayerZStd
	}
	return tarball.LayerFromOpener(opener, tarball.WithMediaType(mediaType))
}

// Image is an image of these layers, the lowest first.
func Image(layers ...v1.Layer) (v1.Image, error) {
	return mutate.AppendLayers(mutate.MediaType(empty.Image, types.OCIManifestSchema1), layers...)
}

// ArtifactFile is a blob of an artifact.
type ArtifactFile struct {
	Data        []byte
	MediaType   string
	Annotations map[string]string
}

// Artifact is an artifact of these blobs, as ORAS pushes it.
func Artifact(files ...ArtifactFile) (v1.Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), "application/vnd.oci.empty.v1+json")
	for _, file := range files {
		mediaType := types.MediaType(file.MediaType)
		if mediaType == "" {
			mediaType = types.OCIUncompressedLayer
		}
		var err error
		image, err = mutate.Append(image, mutate.Addendum{Layer: static.NewLayer(file.Data, mediaType), Annotations: file.Annotations,
			MediaType: mediaType})
		if err != nil {
			return nil, err
		}
	}
	return image, nil
}

// selfSigned is a certificate for an IP address.
func selfSigned(host string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "overlay-csi test registry"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{host}
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{certificate}, PrivateKey: key}, err
}

// ImageOf is an image of layers of files, the lowest first.
func ImageOf[Files ~map[string]string](layers ...Files) (v1.Image, error) {
	made := make([]v1.Layer, len(layers))
	for i, files := range layers {
		var entries []Entry
		for _, name := range slices.Sorted(maps.Keys(files)) {
			entries = append(entries, File(name, files[name]))
		}
		layer, err := Layer(entries...)
		if err != nil {
			return nil, err
		}
		made[i] = layer
	}
	return Image(made...)
}
