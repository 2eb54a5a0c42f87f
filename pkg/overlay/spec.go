// Package overlay makes one overlay mount at a time: it turns a [Spec] into a mounted view with the kernel's mount
// API, or with mount(8) on a kernel that has no such API for overlayfs, and answers questions about mount points
// without reading the mount table.
//
// See https://docs.kernel.org/filesystems/overlayfs.html for the words lower, upper, work, whiteout and volatile.
package overlay

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"
)

// MaxLowers is the most lower directories that one overlay takes (OVL_MAX_STACK in fs/overlayfs/params.h).
const MaxLowers = 500

// Spec is one overlay to be mounted. The directories are open handles (O_PATH is enough), so that nothing that is
// renamed or replaced between their resolution and the mount can put another directory in their place. The mount
// takes its own references: the handles may be closed once Mount has returned.
type Spec struct {
	// Lowers are the read-only directories, the topmost first. One is enough, with and without an upper.
	Lowers []*os.File
	// Upper and Work are directories of one file system, reached through one mount. Both are nil in a read-only view.
	Upper, Work *os.File
	// Volatile leaves out every sync to the upper's file system. An upper that was mounted so must not be mounted
	// again after the machine went down (overlayfs documentation, "Volatile mount").
	Volatile bool
	// LayerOwner has root's files of the lowers appear to be owned by these IDs.
	LayerOwner IDs
	// Metacopy has changes of owners and modes copy up no content. An upper that was mounted so always must be.
	Metacopy bool
	// Attributes are those of the mount itself.
	Attributes Attributes
}

func (s Spec) validate() error {
	switch {
	case len(s.Lowers) == 0:
		return fmt.Errorf("%w: an overlay needs at least one lower directory", errdefs.ErrInvalidArgument)
	case len(s.Lowers) > MaxLowers:
		return fmt.Errorf("%w: %d lower directories: overlayfs takes at most %d", errdefs.ErrInvalidArgument, len(s.Lowers), MaxLowers)
	case (s.Upper == nil) != (s.Work == nil):
		return fmt.Errorf("%w: an overlay takes an upper and a work directory or neither", errdefs.ErrInvalidArgument)
	case s.Volatile && s.Upper == nil:
		return fmt.Errorf("%w: a view without an upper cannot be volatile", errdefs.ErrInvalidArgument)
	}
	return nil
}

// option is one parameter of the overlay file system.
type option struct{ key, value string }

// upperOptions are the overlayfs features of every view that has an upper. They are set one by one because their
// defaults differ between distributions' kernels, and an upper must not meet other ones when it is mounted again.
func (s Spec) upperOptions() []option {
	metacopy := "off"
	if s.Metacopy {
		metacopy = "on"
	}
	options := []option{
		// rename(2) of a directory that comes from a layer works, as programs expect, instead of answering EXDEV.
		{"redirect_dir", "on"},
		// Content is not looked up in a layer by what an upper's metadata says where nothing needs that: a file that was
		// written to is then whole in the upper, which can be looked at and copied without the layers.
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
