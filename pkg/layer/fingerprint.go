package layer

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// CheckUnchanged compares a layer's directory with the fingerprint that it had when it was resolved. It returns ErrNotFound if the
// directory does not exist, and ErrFailedPrecondition if it is another directory or if an entry directly in it was added, removed or
// renamed. It does not look deeper, since that would take as long as there are files. A layer whose fingerprint is "" may change.
func CheckUnchanged(path string, fingerprint linux.Fingerprint) error {
	if fingerprint == "" {
		return nil
	}
	stat, err := linux.StatPath(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: layer %s does not exist any more", errdefs.ErrNotFound, path)
	case err != nil:
		return fmt.Errorf("layer %s: %w", path, err)
	case stat.Fingerprint() != fingerprint:
		return fmt.Errorf(
			"%w: layer %s was changed or replaced since it was mounted, so the content of its views is undefined; restart their pods",
			errdefs.ErrFailedPrecondition, path)
	}
	return nil
}
