package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// MapsGroups reports whether Overlay can show an upper with other groups (Spec.UpperGroups), by trying: the kernel's overlayfs has to
// take an ID-mapped upper, and the upper's file system an ID mapping. It returns ErrFailedPrecondition where the kernel allows no other
// user namespace just now: that passes, and to give files another group does not.
func (m *Mounter) MapsGroups(upper *os.File, swaps []Swap) (bool, error) {
	if !m.features.IDMappedUpper {
		return false, nil
	}
	base, err := m.mapBase(upper, swaps)
	if errors.Is(err, errNotMappable) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, base.Close()
}

// mapBase returns a detached ID-mapped clone of the mount of an upper, whose root is the directory that the upper is in: overlayfs
// wants upper and work directory on one mount.
func (m *Mounter) mapBase(upper *os.File, swaps []Swap) (*os.File, error) {
	namespace, err := m.namespaces.open(idMaps{mapping(), mapping(swaps...)})
	if err != nil {
		return nil, err
	}
	defer namespace.Close()
	base, err := mapMount(upper, "..", 0, namespace)
	if err != nil {
		return nil, fmt.Errorf("ID-map the upper %s: %w", upper.Name(), err)
	}
	return base, nil
}

// mapUpper opens the upper and work directories of a view on an ID-mapped mount, and puts them into its spec. The caller calls close
// after the overlay is mounted, which has a clone of the mount then.
func (m *Mounter) mapUpper(spec *Spec) (close func(), err error) {
	base, err := m.mapBase(spec.Upper, spec.UpperGroups)
	if err != nil {
		return nil, err
	}
	mapped := &mappedDirs{dirs: []*os.File{base}}
	if err := m.attachMapped(mapped); err != nil {
		return nil, err
	}
	upper, err := openSame(base, spec.Upper)
	if err != nil {
		return nil, errors.Join(err, mapped.close())
	}
	work, err := openSame(base, spec.Work)
	if err != nil {
		return nil, errors.Join(err, upper.Close(), mapped.close())
	}
	spec.Upper, spec.Work = upper, work
	return func() {
		upper.Close()
		work.Close()
		// What cannot be unmounted now is unmounted when the next process starts, and is no reason to remove the view.
		_ = mapped.close()
	}, nil
}

// openSame opens a directory that is open already in another mount, of which base is the directory that it is in.
func openSame(base, dir *os.File) (*os.File, error) {
	opened, err := linux.OpenDirAt(base, filepath.Base(dir.Name()))
	if err != nil {
		return nil, err
	}
	want, err := linux.StatMount(dir, "")
	if err == nil {
		var got linux.MountStat
		if got, err = linux.StatMount(opened, ""); err == nil && got.ID != want.ID {
			err = fmt.Errorf("ID-map the upper: %s is another directory than the one that is open", dir.Name())
		}
	}
	if err != nil {
		opened.Close()
		return nil, err
	}
	return opened, nil
}
