package volume

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/api/resource"
)

// parseLimits reads the keys of size, medium and owners, and refuses those that do not go together.
func (s *Spec) parseLimits(parameters map[string]string, usage Usage) error {
	for _, read := range []struct {
		key   string
		parse func(text string) error
	}{
		{KeySizeLimit, func(text string) (err error) { s.Size, err = parseSize(text, usage); return err }},
		{KeyLimit, func(text string) error {
			return oneOf(text, &s.Limit, map[string]Limit{"quota": LimitQuota, "image": LimitImage, "none": LimitNone})
		}},
		{KeyMedium, func(text string) error {
			return oneOf(text, &s.Medium, map[string]Medium{"disk": MediumDisk, "memory": MediumMemory})
		}},
		{KeyLayerOwner, func(text string) (err error) { s.LayerOwner, err = parseOwner(text); return err }},
		{KeyOwnership, func(text string) error {
			return oneOf(text, &s.Ownership, map[string]Ownership{"map": OwnershipMap, "walk": OwnershipWalk, "none": OwnershipNone})
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
	return s.checkTogether(usage)
}

// checkTogether refuses what does not go together. The size of a claim that is being made comes later.
func (s *Spec) checkTogether(usage Usage) error {
	refuse := func(key, reason string) error {
		return fmt.Errorf("%w: key %q: %s", errdefs.ErrInvalidArgument, key, reason)
	}
	switch {
	case s.Size > 0 && s.Upper == UpperPodVolume:
		return refuse(KeySizeLimit, "the upper is in another volume, whose size it has: leave it out")
	case s.Size > 0 && s.Upper == UpperNone:
		return refuse(KeySizeLimit, "nothing is written to a volume that is only read: leave it out")
	case s.Size > 0 && s.Upper == UpperVolume && s.Size < MinKeptSize:
		return refuse(KeySizeLimit, fmt.Sprintf("%d bytes: an upper that is kept has at least %d", s.Size, MinKeptSize))
	case s.Medium == MediumMemory && s.Upper != UpperPod:
		return refuse(KeyMedium, "memory does not outlive the node: it is for upper: pod alone")
	case s.Medium == MediumMemory && s.Limit != LimitBest:
		return refuse(KeyLimit, "a volume in memory is a tmpfs, which has its own limit: leave it out")
	case s.Limit != LimitBest && !s.hasUpper():
		return refuse(KeyLimit, "the volume has no upper of its own: leave it out")
	case s.Ownership == OwnershipWalk && s.Upper == UpperNone:
		return refuse(KeyOwnership, "nothing is written to a volume that is only read: write map, or leave it out")
	case s.Ownership == OwnershipNone && s.LayerOwner != nil:
		return refuse(KeyOwnership, "none leaves the layers' owners as they are: leave layerOwner out, or write map or walk")
	case usage.Create:
		return nil
	}
	return s.CheckSized()
}

// CheckSized refuses a volume that has no size and needs one: an InvalidArgument.
func (s *Spec) CheckSized() error {
	switch {
	case s.Size == 0 && s.Medium == MediumMemory:
		return fmt.Errorf("%w: key %q: a volume in memory needs a size: write %s", errdefs.ErrInvalidArgument, KeyMedium, KeySizeLimit)
	case s.Size == 0 && s.Limit == LimitImage:
		return fmt.Errorf("%w: key %q: a disk image needs a size: write %s", errdefs.ErrInvalidArgument, KeyLimit, KeySizeLimit)
	}
	return nil
}

// parseSize reads a quantity of bytes.
func parseSize(text string, usage Usage) (int64, error) {
	if usage.Create {
		return 0, fmt.Errorf("the size of a claim is its request: leave it out of the StorageClass")
	}
	quantity, err := resource.ParseQuantity(text)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%q is no quantity of bytes, such as 500Mi: %w", text, err)
	case quantity.Sign() <= 0:
		return 0, fmt.Errorf("%s: it must be more than nothing", text)
	case quantity.CmpInt64(MinSize) < 0:
		return 0, fmt.Errorf("%s: it is at least %d bytes", text, MinSize)
	case quantity.CmpInt64(math.MaxInt64) >= 0:
		return 0, fmt.Errorf("%s: there is no disk so large", text)
	}
	return quantity.Value(), nil
}

// maxOwnerID is the largest ID: the one after it means "none" (chown(2)).
const maxOwnerID = math.MaxUint32 - 1

func parseOwner(text string) (*Owner, error) {
	user, group, ok := strings.Cut(text, ":")
	uid, errUser := strconv.ParseUint(user, 10, 32)
	gid, errGroup := strconv.ParseUint(group, 10, 32)
	if !ok || errUser != nil || errGroup != nil || uid > maxOwnerID || gid > maxOwnerID {
		return nil, fmt.Errorf("%q: write uid:gid, two numbers from 0 to %d", text, uint32(maxOwnerID))
	}
	return &Owner{UID: uint32(uid), GID: uint32(gid)}, nil
}

// ParseGroup reads the ID of a group, as kubelet hands over a pod's fsGroup.
func ParseGroup(text string) (uint32, error) {
	gid, err := strconv.ParseUint(text, 10, 32)
	if err != nil || gid > maxOwnerID {
		return 0, fmt.Errorf("%w: volume mount group %q: it is a number from 0 to %d", errdefs.ErrInvalidArgument, text, uint32(maxOwnerID))
	}
	return uint32(gid), nil
}

func oneOf[T ~string](text string, into *T, values map[string]T) error {
	value, ok := values[text]
	if !ok {
		return fmt.Errorf("unknown value %q: there are %s", text, strings.Join(slices.Sorted(maps.Keys(values)), ", "))
	}
	*into = value
	return nil
}
