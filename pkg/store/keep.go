package store

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"k8s.io/klog/v2"
)

// keepRetry is the pause after a failed pull of an image that is to be kept here.
const keepRetry = time.Minute

// ParseName reads the name of an image as it stands behind oci://, without ?path=. A name without tag and digest is one
// with the tag latest, one without a registry is of docker.io.
func ParseName(name string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, fmt.Errorf("%w: image %q: %w", errdefs.ErrInvalidArgument, name, err)
	}
	return reference.TagNameOnly(named), nil
}

// displayName is the name without the digest, where there is a tag.
func displayName(named reference.Named) string {
	if tagged, ok := named.(reference.Tagged); ok {
		return named.Name() + ":" + tagged.Tag()
	}
	return named.String()
}

// keep pulls an image, however long that takes.
func (s *Store) keep(ctx context.Context, name string) {
	for {
		err := s.keepOnce(ctx, name)
		if err == nil || ctx.Err() != nil {
			return
		}
		klog.FromContext(ctx).Error(err, "Could not prefetch an image; it is tried again", "image", name)
		select {
		case <-ctx.Done():
			return
		case <-time.After(keepRetry):
		}
	}
}

func (s *Store) keepOnce(ctx context.Context, name string) error {
	named, err := ParseName(name)
	if err != nil {
		return err
	}
	id, err := s.Resolve(ctx, named, Credentials{})
	if err != nil {
		return err
	}
	pinned, err := reference.WithDigest(named, id)
	if err != nil {
		return err
	}
	use, err := s.Pull(ctx, pinned, Credentials{}, "")
	if err != nil {
		return err
	}
	defer use.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept[name] = id
	return nil
}
