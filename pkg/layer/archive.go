package layer

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// openArchive opens the file, or the directory of an OCI layout, that an archive:// reference names, for reading. Its errors are those
// of openDir.
func (r *Roots) openArchive(ref reference.Reference) (*os.File, error) {
	opened := openedRoots{}
	defer opened.close()
	at, err := r.openRootOf(ref, opened)
	if err != nil {
		return nil, err
	}
	file, err := openBeneath(at.dir, ref, os.O_RDONLY|linux.O_NONBLOCK|linux.O_NOCTTY, at.resolve)
	if err != nil {
		return nil, err
	}
	if err := r.checkArchive(at.dir, file); err != nil {
		file.Close()
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return file, nil
}

// checkArchive returns ErrInvalidArgument if a file that was opened beneath root is neither a file nor a directory, or is in the data
// root.
func (r *Roots) checkArchive(root, file *os.File) error {
	stat, err := linux.StatFile(file)
	switch {
	case err != nil:
		return err
	case stat.IsDir():
		return r.protected.check(root, file)
	case !stat.IsRegular():
		return fmt.Errorf("%w: it is neither a file nor a directory", errdefs.ErrInvalidArgument)
	}
	path, err := linux.CurrentPath(file)
	if err != nil {
		return err
	}
	dir, err := linux.OpenDir(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("%w: open the directory of the archive: %w", errdefs.ErrUnavailable, err)
	}
	defer dir.Close()
	return r.protected.check(root, dir)
}
