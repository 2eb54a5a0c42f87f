package registry

import (
	"fmt"
	"net/url"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// ParseName parses the name of an image without the prefix oci:// and without ?path=. The default tag is latest. The default
// registry is docker.io.
func ParseName(name string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, fmt.Errorf("%w: parse image name %q: %w", errdefs.ErrInvalidArgument, name, err)
	}
	return reference.TagNameOnly(named), nil
}

// DisplayName returns the name of an image. It leaves out the digest if the name has a tag.
func DisplayName(named reference.Named) string {
	if tagged, ok := named.(reference.Tagged); ok {
		return named.Name() + ":" + tagged.Tag()
	}
	return named.String()
}

// hostName returns the host in the name of a registry, without its port.
func hostName(registry string) string { return (&url.URL{Host: registry}).Hostname() }
