package overlay

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"
)

// MaxLowers is the most lower directories that one overlay takes (OVL_MAX_STACK in fs/overlayfs/params.h).
const MaxLowers = 500

// Spec describes an overlay. The directories are open handles (O_PATH is enough), so that nothing that is renamed or replaced between
// their resolution and the mount can put another directory in their place.
type Spec struct {
	// Frozen are frozen uppers, which are lowers as well, the topmost first.
	Frozen []FrozenUpper
	// Lowers are the read-only directories, the topmost first. One is enough, with and without an upper, and there may be none.
	Lowers []*os.File
	// Upper and Work are directories of one file system, reached through one mount. Both are nil in a read-only view.
	Upper, Work *os.File
	// Volatile leaves out every sync to the upper's file system. An upper that was mounted so must not be mounted again after the
	// machine went down (overlayfs documentation, "Volatile mount").
	Volatile bool
	// LayerOwner has root's files of Lowers appear to be owned by these IDs.
	LayerOwner IDs
	// UpperGroups has the groups of the upper's files appear exchanged, one pair after the other. What is written through the view is
	// stored exchanged back. Upper and Work must be in the same directory. See Mounter.MapsGroups.
	UpperGroups []Swap
	// Metacopy has changes of owners and modes copy up metadata only. Once an upper has been
	// mounted with Metacopy, every later mount of it must have it too, also as a frozen one.
	Metacopy bool
	// Attributes are those of the mount.
	Attributes Attributes

	// followsLowers has an overlay without an upper follow the redirects in its lowers.
	followsLowers bool
}

// FrozenUpper is an upper that became read-only.
type FrozenUpper struct {
	Dir *os.File
	// Under is how many of Lowers lie above it. It does not decrease from one to the next.
	Under int
	// Groups has the groups of its files appear exchanged, one pair after the other.
	Groups []Swap
	// Detached is set if Dir is the root of a mount that is in no namespace, and that nobody else has.
	Detached bool
}

func (s Spec) validate() error {
	switch {
	case len(s.Frozen)+len(s.Lowers) > MaxLowers:
		return fmt.Errorf("%w: %d lower directories: overlayfs takes at most %d",
			errdefs.ErrInvalidArgument, len(s.Frozen)+len(s.Lowers), MaxLowers)
	case (s.Upper == nil) != (s.Work == nil):
		return fmt.Errorf("%w: an overlay takes an upper and a work directory or neither", errdefs.ErrInvalidArgument)
	case s.Volatile && s.Upper == nil:
		return fmt.Errorf("%w: a view without an upper cannot be volatile", errdefs.ErrInvalidArgument)
	case len(s.UpperGroups) > 0 && s.Upper == nil:
		return fmt.Errorf("%w: a view without an upper has no groups of an upper", errdefs.ErrInvalidArgument)
	}
	return nil
}

// option is one parameter of the overlay file system.
type option struct{ key, value string }

// upperOptions are the overlayfs features of every view that has an upper, or that reads one. They are set one by one because their
// defaults differ between distributions' kernels, and an upper must not meet other ones when it is mounted again.
func (s Spec) upperOptions() []option {
	metacopy := "off"
	if s.Metacopy {
		metacopy = "on"
	}
	options := []option{
		// rename(2) of a directory that comes from a layer works, as programs expect, instead of answering EXDEV.
		{"redirect_dir", "on"},
		// Without metacopy a file that was written to is whole in the upper, which can be read and copied without the layers.
		{"metacopy", metacopy},
		// An index would tie the upper to file handles of the lowers, which change when a layer is unpacked again.
		{"index", "off"},
		// Inode numbers stay unique and constant over a copy-up wherever the file systems leave bits for it.
		{"xino", "auto"},
	}
	if s.Volatile {
		options = append(options, option{key: "volatile"})
	}
	return options
}
