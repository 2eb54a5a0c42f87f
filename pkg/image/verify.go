package image

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrContentMismatch is wrapped by errors about content that differs from its descriptor or its reference.
var ErrContentMismatch = fmt.Errorf("%w: content mismatch", errdefs.ErrFailedPrecondition)

// Verify returns ErrContentMismatch if the digest or the size in bytes of content differs from its descriptor.
func Verify(want ocispec.Descriptor, got digest.Digest, size int64) error {
	switch {
	case want.Size != size:
		return fmt.Errorf("%w: %s has %d bytes instead of %d", ErrContentMismatch, want.Digest, size, want.Size)
	case want.Digest != got:
		return fmt.Errorf("%w: the content of %s has digest %s", ErrContentMismatch, want.Digest, got)
	}
	return nil
}
