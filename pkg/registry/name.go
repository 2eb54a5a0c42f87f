package registry

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// ParseName parses the name of an image as it stands behind oci://, without ?path=. A name without tag and digest gets the
// tag latest, and one without a registry is on docker.io.
func ParseName(name string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, fmt.Errorf("%w: image %q: %w", errdefs.ErrInvalidArgument, name, err)
	}
	return reference.TagNameOnly(named), nil
}

// DisplayName returns the name without its digest if it has a tag.
func DisplayName(named reference.Named) string {
	if tagged, ok := named.(reference.Tagged); ok {
		return named.Name() + ":" + tagged.Tag()
	}
	return named.String()
}
