package spec

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// parseLimits parses the keys of size, medium and ownership.
func (s *Spec) parseLimits(parameters map[string]string, scope Scope) error {
	for _, read := range []struct {
		key   string
		parse func(text string) error
	}{
		{KeySizeLimit, func(text string) (err error) { s.Size, err = parseSize(text, scope); return err }},
		{KeySizeEnforcement, func(text string) error {
			return oneOf(text, &s.SizeEnforcement, map[string]SizeEnforcement{"quota": EnforceQuota, "image": EnforceImage, "none": EnforceNone})
		}},
		{KeyMedium, func(text string) error {
			return oneOf(text, &s.Medium, map[string]Medium{"disk": MediumDisk, "memory": MediumMemory})
		}},
		{KeyLayerOwner, func(text string) (err error) { s.LayerOwner, err = parseIDs(text); return err }},
		{KeyOwnership, func(text string) error {
			return oneOf(text, &s.Ownership, map[string]Ownership{"idmap": OwnershipIDMap, "chown": OwnershipChown, "none": OwnershipNone})
		}},
	} {
		text, given := parameters[read.key]
		if !given {
			continue
		}
		if err := read.parse(text); err != nil {
			return fmt.Errorf("%w: key %q: %w", errdefs.ErrInvalidArgument, read.key, err)
		}
	}
	if err := s.parseCommit(parameters, scope); err != nil {
		return err
	}
	return s.checkTogether(scope)
}

// parseCommit parses the key of the cache that the upper becomes a version of, and checks the caches among the layers.
func (s *Spec) parseCommit(parameters map[string]string, scope Scope) error {
	refuse := func(key, reason string) error {
		return fmt.Errorf("%w: key %q: %s", errdefs.ErrInvalidArgument, key, reason)
	}
	if slices.ContainsFunc(s.Layers, isCache) {
		switch {
		case !scope.Inline:
			return refuse(KeyLayers, "a cache belongs to the namespace of a pod; use cache:// in an inline volume of the pod")
		case s.Upper == UpperPodVolume:
			return refuse(KeyUpper, "an upper in another volume may outlive the version of the cache that it was written on; write pod or none")
		}
	}
	name, given := parameters[KeyCommit]
	if !given {
		return nil
	}
	below := slices.IndexFunc(s.Layers, func(ref reference.Reference) bool { return isCache(ref) && ref.Name() == name })
	switch {
	case !scope.Inline:
		return refuse(KeyCommit, "a cache belongs to the namespace of a pod; use the key in an inline volume of the pod")
	case !reference.IsName(name):
		return refuse(KeyCommit, fmt.Sprintf("invalid name %q of a cache; a name has lower-case letters, digits, '-' and '.'", name))
	case s.Upper != UpperPod:
		return refuse(KeyCommit, "only what the pod itself keeps becomes a version of a cache; write upper: pod")
	case s.Medium == MediumMemory:
		return refuse(KeyCommit, "a version of a cache is on the disk; leave the key "+KeyMedium+" out")
	case s.Ownership == OwnershipChown:
		return refuse(KeyCommit, "with ownership: chown, the upper has owners of files without their content; write idmap or none")
	case below > 0:
		return refuse(KeyCommit, fmt.Sprintf("what is written over %s also hides files of the layers between; write cache://%s as the first "+
			"layer, or leave it out", s.Layers[0], name))
	}
	s.Commit = name
	return nil
}

// checkTogether refuses values that exclude each other. A claim that is being created gets its size later.
func (s *Spec) checkTogether(scope Scope) error {
	refuse := func(key, reason string) error {
		return fmt.Errorf("%w: key %q: %s", errdefs.ErrInvalidArgument, key, reason)
	}
	switch {
	case s.Size > 0 && s.Upper == UpperPodVolume:
		return refuse(KeySizeLimit, "the upper is in another volume and has the size of that volume; leave the key out")
	case s.Size > 0 && s.Upper == UpperNone:
		return refuse(KeySizeLimit, "the volume is read-only; leave the key out")
	case s.Size > 0 && s.Persistent() && s.Size < MinPersistentSize:
		return refuse(KeySizeLimit, fmt.Sprintf("%d bytes is too small; a persistent upper has at least %d", s.Size, MinPersistentSize))
	case s.Medium == MediumMemory && !s.Ephemeral():
		return refuse(KeyMedium, "memory does not outlive the node; use it with upper: pod")
	case s.Medium == MediumMemory && s.SizeEnforcement != EnforceBest:
		return refuse(KeySizeEnforcement, "a volume in memory is a tmpfs, which has its own limit; leave the key out")
	case s.SizeEnforcement != EnforceBest && !s.ManagesUpper():
		return refuse(KeySizeEnforcement, "the volume has no upper of its own; leave the key out")
	case s.Ownership == OwnershipChown && s.Upper == UpperNone:
		return refuse(KeyOwnership, "chown cannot be used with a read-only volume; write idmap, or leave the key out")
	case s.Ownership == OwnershipNone && s.LayerOwner != nil:
		return refuse(KeyOwnership, "none leaves the layers' owners as they are; leave layerOwner out, or write idmap or chown")
	case scope.Create:
		return nil
	}
	return s.CheckSized()
}

// CheckSized returns ErrInvalidArgument if the volume needs a size and has none.
func (s *Spec) CheckSized() error {
	switch {
	case s.Size == 0 && s.Medium == MediumMemory:
		return fmt.Errorf("%w: key %q: a volume in memory needs a size; write %s", errdefs.ErrInvalidArgument, KeyMedium, KeySizeLimit)
	case s.Size == 0 && s.SizeEnforcement == EnforceImage:
		return fmt.Errorf("%w: key %q: a disk image needs a size; write %s", errdefs.ErrInvalidArgument, KeySizeEnforcement, KeySizeLimit)
	}
	return nil
}

// parseSize parses a quantity of bytes.
func parseSize(text string, scope Scope) (int64, error) {
	if scope.Create {
		return 0, errors.New("the size of a claim is its request; leave the key out of the StorageClass")
	}
	quantity, err := resource.ParseQuantity(text)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%q is not a quantity of bytes such as 500Mi: %w", text, err)
	case quantity.Sign() <= 0:
		return 0, fmt.Errorf("%s: the size must be positive", text)
	case quantity.CmpInt64(MinSize) < 0:
		return 0, fmt.Errorf("%s: the minimum is %d bytes", text, MinSize)
	case quantity.CmpInt64(math.MaxInt64) >= 0:
		return 0, fmt.Errorf("%s: the size exceeds the maximum of 8Ei", text)
	}
	return quantity.Value(), nil
}

// maxID is the largest user or group ID: the next number means "none" in chown(2).
const maxID = math.MaxUint32 - 1

func parseIDs(text string) (*IDs, error) {
	user, group, ok := strings.Cut(text, ":")
	uid, errUser := strconv.ParseUint(user, 10, 32)
	gid, errGroup := strconv.ParseUint(group, 10, 32)
	if !ok || errUser != nil || errGroup != nil || uid > maxID || gid > maxID {
		return nil, fmt.Errorf("%q is not uid:gid; write two numbers from 0 to %d", text, uint32(maxID))
	}
	return &IDs{UID: uint32(uid), GID: uint32(gid)}, nil
}

// ParseGroup parses a group ID, as kubelet passes a pod's fsGroup.
func ParseGroup(text string) (uint32, error) {
	gid, err := strconv.ParseUint(text, 10, 32)
	if err != nil || gid > maxID {
		return 0, fmt.Errorf("%w: volume mount group %q is not a number from 0 to %d", errdefs.ErrInvalidArgument, text, uint32(maxID))
	}
	return uint32(gid), nil
}

func oneOf[T ~string](text string, into *T, values map[string]T) error {
	value, ok := values[text]
	if !ok {
		return fmt.Errorf("unknown value %q; the values are %s", text, strings.Join(slices.Sorted(maps.Keys(values)), ", "))
	}
	*into = value
	return nil
}
