package portable

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	dockerref "github.com/distribution/reference"
)

const (
	// prefix begins the handle of a snapshot in a registry. No other handle has it.
	prefix = "push:"
	// tagPrefix begins the tag that a snapshot is pushed to.
	tagPrefix = "snap-"
	// maxMade is the length of the longest handle that is made in bytes: that of all texts in CSI. maxGiven is that of a handle which
	// somebody wrote into a VolumeSnapshotContent.
	maxMade  = 128
	maxGiven = 512
)

// Handle is the handle of a snapshot that is an image in a registry: "push:" and the reference of that image. The zero value is none.
type Handle struct {
	named dockerref.Named
}

// IsHandle reports whether the ID of a snapshot is meant to be such a handle.
func IsHandle(id string) bool { return strings.HasPrefix(id, prefix) }

// New returns the handle of the snapshot with a name, of a volume on the node with a topology segment, in a repository. It is the same for
// a repeated request, also from elsewhere. It returns ErrInvalidArgument for what is no repository.
func New(repository, name, segment string) (Handle, error) {
	named, err := dockerref.ParseNormalizedNamed(repository)
	if err != nil {
		return Handle{}, fmt.Errorf("%w: repository %.256q: %w", errdefs.ErrInvalidArgument, repository, err)
	}
	if !dockerref.IsNameOnly(named) {
		return Handle{}, fmt.Errorf("%w: repository %.256q has a tag or a digest; each snapshot gets a tag of its own",
			errdefs.ErrInvalidArgument, repository)
	}
	tagged, err := dockerref.WithTag(named, tagPrefix+hint(segment)+"-"+digits(name, 12))
	if err != nil {
		return Handle{}, fmt.Errorf("%w: repository %.256q: %w", errdefs.ErrInvalidArgument, repository, err)
	}
	handle := Handle{tagged}
	if excess := len(handle.String()) - maxMade; excess > 0 {
		return Handle{}, fmt.Errorf("%w: repository %.256q is %d bytes too long: CSI has handles of at most %d bytes",
			errdefs.ErrInvalidArgument, repository, excess, maxMade)
	}
	return handle, nil
}

// Parse parses a handle. It takes every image with a tag or a digest: an operator may write one into a VolumeSnapshotContent. It returns
// ErrInvalidArgument for anything else.
func Parse(id string) (Handle, error) {
	text, ok := strings.CutPrefix(id, prefix)
	if !ok || len(id) > maxGiven {
		return Handle{}, fmt.Errorf("%w: snapshot %.256q is no handle of at most %d bytes that begins with %s",
			errdefs.ErrInvalidArgument, id, maxGiven, prefix)
	}
	named, err := dockerref.ParseNormalizedNamed(text)
	if err != nil {
		return Handle{}, fmt.Errorf("%w: snapshot %q: %w", errdefs.ErrInvalidArgument, id, err)
	}
	if dockerref.IsNameOnly(named) {
		return Handle{}, fmt.Errorf("%w: snapshot %q has neither a tag nor a digest", errdefs.ErrInvalidArgument, id)
	}
	return Handle{named}, nil
}

// String returns the text of the handle, "" for none.
func (h Handle) String() string {
	if h.named == nil {
		return ""
	}
	return prefix + h.named.String()
}

// IsZero reports whether this is no handle.
func (h Handle) IsZero() bool { return h.named == nil }

// Image returns the name of the image.
func (h Handle) Image() string { return h.named.String() }

// RecordID returns the ID of the record that the node of the snapshot has of it, which is the tag. It is "" for an image that no
// node has pushed as a snapshot.
func (h Handle) RecordID() string {
	if _, isDigest := h.named.(dockerref.Digested); isDigest {
		return ""
	}
	if tagged, ok := h.named.(dockerref.Tagged); ok && isOurs(tagged.Tag()) {
		return tagged.Tag()
	}
	return ""
}

// MayBeOf reports whether the snapshot may have been taken on the node with a topology segment. It is false for nearly all others.
func (h Handle) MayBeOf(segment string) bool {
	return strings.HasPrefix(h.RecordID(), tagPrefix+hint(segment)+"-")
}

// hint is what the tag says of the node.
func hint(segment string) string { return digits(segment, 4) }

// digits returns the first bytes of the digest of a text in hexadecimal digits.
func digits(text string, bytes int) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:bytes])
}

// isOurs reports whether a tag is one that New makes. It can be the name of a directory then.
func isOurs(tag string) bool {
	rest, ok := strings.CutPrefix(tag, tagPrefix)
	node, name, found := strings.Cut(rest, "-")
	isHex := func(text string, bytes int) bool {
		decoded, err := hex.DecodeString(text)
		return err == nil && len(decoded) == bytes
	}
	return ok && found && isHex(node, 4) && isHex(name, 12)
}
