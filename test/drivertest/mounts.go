package drivertest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Mounts are the mounts at and beneath dir, in the order in which they were made.
func Mounts(dir string) ([]*mountinfo.Info, error) {
	return linux.Mounts(mountinfo.PrefixFilter(dir))
}

// UnmountBeneath unmounts everything at and beneath dir, the last first.
func UnmountBeneath(dir string) error {
	mounts, err := Mounts(dir)
	if err != nil {
		return err
	}
	var failed error
	for _, mount := range slices.Backward(mounts) {
		if strings.HasPrefix(mount.Source, "/dev/loop") {
			thaw(mount.Mountpoint)
		}
		if err := unix.Unmount(mount.Mountpoint, unix.MNT_DETACH); err != nil {
			failed = errors.Join(failed, &os.PathError{Op: "umount", Path: mount.Mountpoint, Err: err})
		}
	}
	return failed
}

// thaw ends what a driver that was killed may have begun. A file system that is frozen outlives its mounts, though not a reboot.
func thaw(path string) {
	if dir, err := os.Open(path); err == nil {
		_ = linux.ThawFS(dir)
		dir.Close()
	}
}

// Leftovers lists everything that a driver with no volume should not have: mounts in kubelet's directory, and files in
// the data root and mount points beside its own empty directories. Trash does not count, it is on its way out.
func (n *Node) Leftovers() ([]string, error) {
	var found []string
	mounts, err := Mounts(n.KubeletDir)
	if err != nil {
		return nil, err
	}
	for _, mount := range mounts {
		found = append(found, "mount "+mount.Mountpoint)
	}
	for _, dir := range []string{filepath.Join(n.DataRoot, "volumes"), filepath.Join(n.DataRoot, "mounter", "l"), n.upperMountDir()} {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err == nil && path != dir {
				found = append(found, strings.TrimPrefix(path, n.Dir+"/"))
			}
			if path == dir && errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// upperMountDir is where the driver mounts the file systems of uppers.
func (n *Node) upperMountDir() string {
	return filepath.Join(n.KubeletDir, "plugins", DriverName, "uppers")
}

// Options are the overlay options of the view that is mounted at path, as the kernel shows them.
func Options(path string) ([]string, error) {
	mounts, err := linux.Mounts(mountinfo.SingleEntryFilter(path))
	if err != nil || len(mounts) == 0 {
		return nil, errors.Join(err, fs.ErrNotExist)
	}
	return strings.Split(mounts[0].VFSOptions, ","), nil
}
