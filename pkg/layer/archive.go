package layer

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// openArchiveInTime is openArchive where the file system answers. It returns ErrDoesNotAnswer where it does not.
func (r *Roots) openArchiveInTime(ctx context.Context, ref reference.Reference) (*os.File, error) {
	return r.questions.askOne(ctx, patience, rootName(ref.Name()), ref.Path(), func() (*os.File, error) { return r.openArchive(ref) })
}

// openArchive opens the file, or the directory of an OCI layout, that an archive:// reference names, for reading. Its errors are those
// of openDir.
func (r *Roots) openArchive(ref reference.Reference) (*os.File, error) {
	at, err := r.openRootOf(ref)
	if err != nil {
		return nil, err
	}
	defer at.close()
	// Somebody may have put a device there, and opening a device has effects. A handle (O_PATH) has none.
	handle, err := openBeneath(at.dir, ref, linux.O_PATH, at.resolve)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	if err := r.checkArchive(at.id, handle); err != nil {
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	file, err := linux.Reopen(handle, os.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return file, nil
}

// checkArchive returns ErrInvalidArgument if what was opened beneath root is neither a file nor a directory, or is in the data root.
func (r *Roots) checkArchive(root linux.FileID, handle *os.File) error {
	stat, err := linux.StatFile(handle)
	switch {
	case err != nil:
		return err
	case stat.IsDir():
		return r.protected.check(root, handle, stat.ID())
	case !stat.IsRegular():
		return fmt.Errorf("%w: it is neither a file nor a directory", errdefs.ErrInvalidArgument)
	}
	path, err := linux.CurrentPath(handle)
	if err != nil {
		return err
	}
	dir, err := linux.OpenDir(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("%w: open the directory of the archive: %w", errdefs.ErrUnavailable, err)
	}
	defer dir.Close()
	// The path may lead elsewhere since it was read.
	if entry, err := linux.Fstatat(dir, filepath.Base(path)); err != nil || entry.ID() != stat.ID() {
		return fmt.Errorf("%w: the archive was moved or replaced while it was opened", errdefs.ErrUnavailable)
	}
	dirStat, err := linux.StatFile(dir)
	if err != nil {
		return err
	}
	return r.protected.check(root, dir, dirStat.ID())
}
