package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"

	mount "k8s.io/mount-utils"
	"k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Mounter mounts overlays and binds of them, and unmounts them. It satisfies mount-utils' Interface, so that the helpers of the
// Kubernetes storage world work with it; what that interface asks about one path (is it a mount point, unmount it) costs the same
// however many mounts there are, and starts no process. What needs the whole mount table (List, GetMountRefs) and mounts of other file
// systems (Mount and its variants) are mount-utils' own.
type Mounter struct {
	mount.Interface
	features Features
	commands exec.Interface
	// empty are empty directories: overlayfs takes a directory once.
	empty [2]*os.File
	// scratch has a directory for each mount that is in progress.
	scratch    string
	next       atomic.Uint64
	namespaces namespaces
	questions  questions
}

// scratchName is short: see mountWithCommand.
const scratchName = "l"

var _ mount.Interface = (*Mounter)(nil)

// Config configures a [Mounter].
type Config struct {
	// Dir is a directory that belongs to this mounter alone. It is made if it does not exist.
	Dir string
	// Features are those of the kernel; see [Probe].
	Features Features
	// MountUtils mounts other file systems and reads the mount table.
	MountUtils mount.Interface
	// Commands runs mount(8) on a kernel without the feature mount-api.
	Commands exec.Interface
}

// NewMounter returns a mounter. It removes what an earlier process with the same directory left there.
func NewMounter(config Config) (*Mounter, error) {
	scratch := filepath.Join(config.Dir, scratchName)
	emptyPaths := []string{filepath.Join(config.Dir, "empty"), filepath.Join(config.Dir, "empty-below")}
	for _, path := range emptyPaths {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return nil, fmt.Errorf("make the mounter's directory: %w", err)
		}
	}
	if err := clearScratch(scratch); err != nil {
		return nil, fmt.Errorf("clear what an earlier process left: %w", err)
	}
	if err := os.MkdirAll(scratch, 0o700); err != nil {
		return nil, fmt.Errorf("make the mounter's directory: %w", err)
	}
	m := &Mounter{Interface: config.MountUtils, features: config.Features, commands: config.Commands, scratch: scratch}
	for i, path := range emptyPaths {
		var err error
		if m.empty[i], err = linux.OpenDir(path); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// clearScratch removes the links that a crash left, and unmounts the ID-mapped layers that are mounted among them first: the files of
// these must not be removed. The directory itself stays: on a full disk it could not be made again. Links stay on a disk that cannot be
// written to; makeScratch takes other names.
func clearScratch(dir string) error {
	left, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil {
		return err
	}
	for _, path := range left {
		if mounted, err := linux.IsMountPoint(path); err != nil || !mounted {
			continue
		}
		if err := linux.UnmountLazily(path); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, entry := range entries {
		err = errors.Join(err, removeScratch(filepath.Join(dir, entry.Name())))
	}
	if linux.IsNotWritable(err) {
		return nil
	}
	return err
}

// makeScratch makes a directory for one mount. Its name is short: see mountWithCommand.
func (m *Mounter) makeScratch() (path string, err error) {
	for {
		path = filepath.Join(m.scratch, strconv.FormatUint(m.next.Add(1), 36))
		err := os.Mkdir(path, 0o700)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("make a directory of the mounter: %w", err)
		}
		return path, nil
	}
}

// Close closes the mounter's handles. Views stay mounted.
func (m *Mounter) Close() error {
	m.namespaces.close()
	return errors.Join(m.empty[0].Close(), m.empty[1].Close())
}

// withEmpty returns the lowers of a view with empty ones beneath them, which change nothing in the view, where it has too few: overlayfs
// wants one, and two if there is no upper.
func (m *Mounter) withEmpty(spec Spec) []*os.File {
	lowers := slices.Clone(spec.Lowers)
	for _, empty := range m.empty {
		if len(lowers) > 1 || len(lowers) == 1 && spec.Upper != nil {
			break
		}
		lowers = append(lowers, empty)
	}
	return lowers
}

// Overlay mounts a view at target, an open directory, either whole or not at all. Callers may close the handles in spec after Overlay
// returns. The error is ErrUpperInUse or of a kind of containerd/errdefs where the cause is known, and has the kernel's own message.
func (m *Mounter) Overlay(spec Spec, target *os.File) error {
	return m.mapped(spec, func(spec Spec) error {
		if m.features.MountAPI {
			return m.mountWithAPI(spec, target)
		}
		return m.mountWithCommand(spec, target)
	})
}

// mapped calls mount with a spec that has the lowers and the upper as they are to appear.
func (m *Mounter) mapped(spec Spec, mount func(Spec) error) error {
	if err := spec.validate(); err != nil {
		return err
	}
	mapped, err := m.mapLowers(&spec)
	if err != nil {
		return err
	}
	spec.Lowers = m.withEmpty(spec)
	defer func() {
		// What cannot be unmounted now is unmounted when the next process starts, and is no reason to remove the view.
		_ = mapped.close()
	}()
	if len(spec.UpperGroups) > 0 {
		unmap, err := m.mapUpper(&spec)
		if err != nil {
			return err
		}
		defer unmap()
	}
	return mount(spec)
}
