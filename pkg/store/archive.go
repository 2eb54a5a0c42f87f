package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// ArchiveFile tells an archive, and its content, from another: a file that was not changed is not read again.
type ArchiveFile struct {
	// Reference is how it was named.
	Reference string    `json:"reference"`
	Device    uint64    `json:"device"`
	Inode     uint64    `json:"inode"`
	Size      int64     `json:"size"`
	Modified  time.Time `json:"modified"`
}

// key stands for the archive where a digest has to.
func (a ArchiveFile) key() digest.Digest {
	return digest.FromString(fmt.Sprintf("%q %d %d %d %d", a.Reference, a.Device, a.Inode, a.Size, a.Modified.UnixNano()))
}

// identify looks at an archive. Of the directory of an OCI layout it is index.json that changes with its content.
func identify(name string, file *os.File) (ArchiveFile, bool, error) {
	var stat, index unix.Stat_t
	err := unix.Fstat(int(file.Fd()), &stat)
	isDir := err == nil && stat.Mode&unix.S_IFMT == unix.S_IFDIR
	if isDir {
		err = unix.Fstatat(int(file.Fd()), ocispec.ImageIndexFile, &index, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			return ArchiveFile{}, true, fmt.Errorf("%w: a directory without %s is no OCI layout", errdefs.ErrInvalidArgument, ocispec.ImageIndexFile)
		}
		stat = index
	}
	if err != nil {
		return ArchiveFile{}, isDir, fmt.Errorf("stat the archive: %w", err)
	}
	modified := time.Unix(stat.Mtim.Unix()).UTC()
	return ArchiveFile{Reference: name, Device: stat.Dev, Inode: stat.Ino, Size: stat.Size, Modified: modified}, isDir, nil
}

// Import brings the layers of an archive here, which file is opened for reading, and opens them: a docker archive, an OCI
// archive, the directory of an OCI layout, or the tar of a root file system. name is what the archive is called in
// messages. wanted is the digest that it had, or "". As with Pull, it goes on when ctx is done. Import closes the file.
func (s *Store) Import(ctx context.Context, name string, file *os.File, wanted digest.Digest) (*Use, error) {
	identity, isDir, err := identify(name, file)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("archive %s: %w", name, err)
	}
	s.mu.Lock()
	for _, image := range s.images {
		if image.Archive != nil && *image.Archive == identity && s.holdLocked(image.diffIDs()) {
			s.mu.Unlock()
			file.Close()
			u, err := s.use(image, "")
			return checkWanted(u, err, name, wanted)
		}
	}
	p := s.startLocked(pullKey{image: identity.key()}, name, file.Close, func(ctx context.Context, p *pull) error {
		return s.importArchive(ctx, p, identity, file, isDir)
	})
	u, err := s.wait(ctx, p, "")
	return checkWanted(u, err, name, wanted)
}

// checkWanted refuses an archive that is not the one any more that a volume was made on.
func checkWanted(u *Use, err error, name string, wanted digest.Digest) (*Use, error) {
	if err == nil && wanted != "" && u.Image.Digest != wanted {
		u.Close()
		return nil, fmt.Errorf("%w: archive %s: it was changed: the volume was made on %s, and it is %s now: put the former file back, or use another volume", errdefs.ErrFailedPrecondition, name, wanted, u.Image.Digest)
	}
	return u, err
}

// archiveName is the directory in which an archive is decompressed.
func archiveName(key digest.Digest) string { return "archive-" + key.Encoded() }

// importArchive finds out what an archive is, and unpacks its layers.
func (s *Store) importArchive(ctx context.Context, p *pull, identity ArchiveFile, file *os.File, isDir bool) error {
	dir := s.incomingDir(archiveName(identity.key()))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	err := s.importFrom(ctx, p, identity, file, isDir, dir)
	return errors.Join(err, s.config.Discard(dir))
}

func (s *Store) importFrom(ctx context.Context, p *pull, identity ArchiveFile, file *os.File, isDir bool, dir string) error {
	image := Image{Names: []string{identity.Reference}, Archive: &identity}
	content, err := openArchive(ctx, file, isDir, filepath.Join(dir, "archive.tar"))
	if err != nil {
		return err
	}
	if content == nil {
		return s.importTar(ctx, p, image, file)
	}
	defer content.close()
	sources, names, err := s.describeArchive(ctx, &image, content)
	if err != nil {
		return err
	}
	return s.pullLayers(ctx, p, image, sources, func(ctx context.Context, src source) (digest.Digest, error) {
		return s.layer(ctx, src, func(ctx context.Context, f *fetch) (Layer, error) {
			blob, _, err := content.open(names[src.descriptor.Digest])
			if err != nil {
				return Layer{}, err
			}
			defer blob.Close()
			return s.readLayer(ctx, src, blob, f)
		})
	})
}

// importTar takes a tar as the only layer of an image.
func (s *Store) importTar(ctx context.Context, p *pull, image Image, file *os.File) error {
	src := source{descriptor: ocispec.Descriptor{Digest: image.Archive.key(), Size: image.Archive.Size}, anyBlob: true}
	return s.pullLayers(ctx, p, image, []source{src}, func(ctx context.Context, src source) (digest.Digest, error) {
		return s.layer(ctx, src, func(ctx context.Context, f *fetch) (Layer, error) {
			layer, err := s.readLayer(ctx, src, io.NewSectionReader(file, 0, image.Archive.Size), f)
			if err != nil {
				return layer, err
			}
			after, _, err := identify(image.Archive.Reference, file)
			if err == nil && after != *image.Archive {
				err = fmt.Errorf("%w: the archive was changed while it was read: it is read again", errdefs.ErrUnavailable)
			}
			return layer, err
		})
	})
}

// readLayer unpacks a layer of an archive.
func (s *Store) readLayer(ctx context.Context, src source, blob io.Reader, f *fetch) (Layer, error) {
	dir := s.incomingDir(buildName(src.key()))
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		err = s.discardIncoming(dir, false)
	}
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err != nil {
		return Layer{}, fmt.Errorf("make a directory for layer %s: %w", src.descriptor.Digest, err)
	}
	layer, err := s.buildLayer(ctx, dir, src, &counting{blob, f})
	if err != nil {
		return Layer{}, errors.Join(s.explainFull(src, err), s.discardIncoming(dir, false))
	}
	return layer, nil
}

// counting tells a fetch how far its reader is.
type counting struct {
	from io.Reader
	f    *fetch
}

func (c *counting) Read(buffer []byte) (int, error) {
	n, err := c.from.Read(buffer)
	c.f.received.Add(int64(n))
	return n, err
}

const (
	dockerManifest = "manifest.json"
	blobsName      = "blobs"
)

// describeArchive finds the one image of an archive that is for this platform, and under what names its blobs are.
func (s *Store) describeArchive(ctx context.Context, image *Image, content archiveContent) ([]source, map[digest.Digest]string, error) {
	if !content.has(ocispec.ImageIndexFile) {
		return describeDocker(image, content)
	}
	data, err := readSmall(content, ocispec.ImageIndexFile)
	if err != nil {
		return nil, nil, err
	}
	descriptor, err := chooseInLayout(data)
	if err != nil {
		return nil, nil, err
	}
	image.Digest = descriptor.Digest
	sources, err := s.describe(ctx, image, descriptor, func(_ context.Context, descriptor ocispec.Descriptor) ([]byte, error) {
		data, err := readSmall(content, blobPath(descriptor.Digest))
		if err == nil {
			err = verify(descriptor, descriptor.Digest.Algorithm().FromBytes(data), int64(len(data)))
		}
		return data, err
	})
	names := map[digest.Digest]string{}
	for _, src := range sources {
		names[src.descriptor.Digest] = blobPath(src.descriptor.Digest)
	}
	return sources, names, err
}

func blobPath(id digest.Digest) string {
	return path.Join(blobsName, id.Algorithm().String(), id.Encoded())
}

// chooseInLayout finds the one image of a layout, which may be an index for many platforms, and may have many names.
func chooseInLayout(data []byte) (ocispec.Descriptor, error) {
	document, err := parseDocument(data)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var images []ocispec.Descriptor
	for _, descriptor := range document.Manifests {
		if !slices.ContainsFunc(images, func(d ocispec.Descriptor) bool { return d.Digest == descriptor.Digest }) {
			images = append(images, descriptor)
		}
	}
	if len(images) != 1 {
		return ocispec.Descriptor{}, fmt.Errorf("%w: the archive has %d images: make one archive for each", errdefs.ErrInvalidArgument, len(images))
	}
	return images[0], nil
}

// describeDocker reads the manifest.json of a docker archive, in which layers have names instead of digests.
func describeDocker(image *Image, content archiveContent) ([]source, map[digest.Digest]string, error) {
	data, err := readSmall(content, dockerManifest)
	if err != nil {
		return nil, nil, err
	}
	manifest, err := parseDockerManifest(data)
	if err != nil {
		return nil, nil, err
	}
	config, err := readSmall(content, manifest.Config)
	if err != nil {
		return nil, nil, err
	}
	var parsed ocispec.Image
	if err := json.Unmarshal(config, &parsed); err != nil {
		return nil, nil, fmt.Errorf("%w: read the image's configuration: %w", errdefs.ErrInvalidArgument, err)
	}
	diffIDs := parsed.RootFS.DiffIDs
	if len(diffIDs) != len(manifest.Layers) {
		return nil, nil, fmt.Errorf("%w: the image has %d layers, and its configuration %d diff IDs", errdefs.ErrInvalidArgument, len(manifest.Layers), len(diffIDs))
	}
	image.Digest, image.Platform = digest.FromBytes(config), platformName(parsed.Platform)
	sources, names := make([]source, len(diffIDs)), map[digest.Digest]string{}
	for i, id := range diffIDs {
		if id.Validate() != nil || id.Algorithm() != digest.SHA256 {
			return nil, nil, fmt.Errorf("%w: the image's configuration has diff ID %q", errdefs.ErrInvalidArgument, id)
		}
		blob, size, err := content.open(manifest.Layers[i])
		if err != nil {
			return nil, nil, err
		}
		blob.Close()
		sources[i] = source{descriptor: ocispec.Descriptor{Digest: id, Size: size}, diffID: id, anyBlob: true}
		names[id] = manifest.Layers[i]
	}
	return sources, names, nil
}

// dockerImage is an image in a docker archive.
type dockerImage struct {
	Config string
	Layers []string
}

func parseDockerManifest(data []byte) (dockerImage, error) {
	var images []dockerImage
	if err := json.Unmarshal(data, &images); err != nil {
		return dockerImage{}, fmt.Errorf("%w: read %s: %w", errdefs.ErrInvalidArgument, dockerManifest, err)
	}
	switch {
	case len(images) != 1:
		return dockerImage{}, fmt.Errorf("%w: the archive has %d images: make one archive for each", errdefs.ErrInvalidArgument, len(images))
	case len(images[0].Layers) == 0 || len(images[0].Layers) > maxLayers:
		return dockerImage{}, fmt.Errorf("%w: the image has %d layers: at least 1, and at most %d", errdefs.ErrInvalidArgument, len(images[0].Layers), maxLayers)
	}
	return images[0], nil
}
