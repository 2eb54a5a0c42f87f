package overlay

import (
	"fmt"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// View is one overlay of the driver as the mount table shows it.
type View struct {
	// Device is the number of the overlay, which no other one has while it is mounted.
	Device string
	// Targets are the paths at which it is mounted, bind mounts included.
	Targets []string
	// Lowers are the paths of the lower directories. They are what the kernel was given: a directory that was named by its path in
	// /proc has that path, one of mount(8) a relative one, and an ID-mapped one is "/".
	Lowers []string
}

// Views reads the views of this mount namespace from the mount table. Views of other drivers on the node are among them.
func Views() ([]View, error) {
	mounts, err := linux.Mounts(func(mount *mountinfo.Info) (skip, stop bool) {
		return mount.FSType != fsType || mount.Source != mountSource, false
	})
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	return viewsOf(mounts), nil
}

// viewsOf returns the views that overlays in the mount table are of.
func viewsOf(mounts []*mountinfo.Info) []View {
	var views []View
	// found are their indexes by device.
	found := map[string]int{}
	for _, mount := range mounts {
		device := fmt.Sprintf("%d:%d", mount.Major, mount.Minor)
		i, ok := found[device]
		if !ok {
			i = len(views)
			found[device] = i
			views = append(views, View{Device: device, Lowers: lowersOf(mount.VFSOptions)})
		}
		views[i].Targets = append(views[i].Targets, mount.Mountpoint)
	}
	return views
}

// lowersOf returns the lower directories in the options of an overlay. The kernel escapes commas in paths.
func lowersOf(options string) []string {
	var lowers []string
	for option := range strings.SplitSeq(options, ",") {
		if path, ok := strings.CutPrefix(option, "lowerdir+="); ok {
			lowers = append(lowers, path)
		} else if paths, ok := strings.CutPrefix(option, "lowerdir="); ok {
			lowers = append(lowers, strings.Split(paths, ":")...)
		}
	}
	return lowers
}
