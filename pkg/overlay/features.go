package overlay

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrKernelTooOld says that this kernel lacks something that the driver cannot do without.
var ErrKernelTooOld = errors.New("the kernel lacks a feature that overlay-csi needs")

// Features is what this kernel can do beyond what the driver asks of every kernel (openat2 and the mount-root
// attribute of statx: Linux 5.8; volatile overlays: 5.10).
type Features struct {
	// MountAPI: overlayfs takes its lowers one by one (fsconfig with "lowerdir+", Linux 6.7). Without it views are
	// mounted by mount(8).
	MountAPI bool
	// LayerFD: overlayfs takes a directory as a descriptor (FSCONFIG_SET_FD, Linux 6.13). Without it descriptors are
	// named through /proc/self/fd.
	LayerFD bool
	// StatMount: statmount(2) tells a mount's file system without asking that (Linux 6.8). Without it statfs does,
	// which a network file system that is away can keep waiting.
	StatMount bool
	// DetachedLayer: overlayfs takes a directory on a mount that is in no namespace (Linux 6.15). See DetachedRoot.
	DetachedLayer bool
}

// featureNames are the names of features as flags and logs give them.
var featureNames = map[string]func(*Features) *bool{
	"mount-api":      func(f *Features) *bool { return &f.MountAPI },
	"layer-fd":       func(f *Features) *bool { return &f.LayerFD },
	"statmount":      func(f *Features) *bool { return &f.StatMount },
	"detached-layer": func(f *Features) *bool { return &f.DetachedLayer },
}

// fallbacks are what is done on a kernel that lacks a feature.
var fallbacks = map[string]string{
	"mount-api":      "views are mounted by mount(8)",
	"layer-fd":       "directories are handed over by their names in /proc/self/fd",
	"statmount":      "the file system of a mount is asked itself what it is (statfs)",
	"detached-layer": "layers and uppers are used on the mounts that they are on, and ID-mapped layers are attached while a view is mounted",
}

// Fallbacks say, of each feature that is not there, what is done instead.
func (f Features) Fallbacks() []string {
	var said []string
	for _, name := range FeatureNames() {
		if !*featureNames[name](&f) {
			said = append(said, "no "+name+": "+fallbacks[name])
		}
	}
	return said
}

// FeatureNames are the names that Without takes, sorted.
func FeatureNames() []string { return slices.Sorted(maps.Keys(featureNames)) }

// Without returns the features less those named: what the driver does on a kernel that lacks them can so be tried on
// one that has them. An unknown name is an error.
func (f Features) Without(names ...string) (Features, error) {
	for _, name := range names {
		field, ok := featureNames[name]
		if !ok {
			return Features{}, fmt.Errorf("unknown kernel feature %q: there are %s", name, strings.Join(FeatureNames(), ", "))
		}
		*field(&f) = false
	}
	f.LayerFD = f.LayerFD && f.MountAPI
	// A detached mount has no path, so that it can be handed over by descriptor alone.
	f.DetachedLayer = f.DetachedLayer && f.LayerFD
	return f, nil
}

// String names the features that are there.
func (f Features) String() string {
	var names []string
	for _, name := range FeatureNames() {
		if *featureNames[name](&f) {
			names = append(names, name)
		}
	}
	return strings.Join(names, ",")
}

// probeNames are two directories that Probe makes to try an overlay of them.
var probeNames = []string{"probe-1", "probe-2"}

// Probe finds out what the kernel can do by doing it: it configures overlays of directories that it makes in dir, and
// throws them away before anything is mounted. The error is ErrKernelTooOld where the driver cannot work at all.
func Probe(dir string) (Features, error) {
	if err := probeRequired(dir); err != nil {
		return Features{}, err
	}
	if err := probeOverlay(); err != nil {
		return Features{}, err
	}
	for _, name := range probeNames {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			return Features{}, fmt.Errorf("probe the kernel: %w", err)
		}
	}
	base, err := openDir(dir)
	if err != nil {
		return Features{}, fmt.Errorf("probe the kernel: %w", err)
	}
	defer base.Close()
	var features Features
	features.MountAPI = canUseLayers(base, setLayerPath)
	features.LayerFD = features.MountAPI && canUseLayers(base, setLayerFD)
	features.DetachedLayer = features.LayerFD && canUseDetachedLayers(dir)
	stat, err := statMount(unix.AT_FDCWD, dir, 0)
	if err != nil {
		return Features{}, fmt.Errorf("probe the kernel: %w", err)
	}
	if stat.Mask&unix.STATX_MNT_ID_UNIQUE != 0 {
		_, err = superMagic(stat.Mnt_id)
		features.StatMount = err == nil
	}
	return features, nil
}

// probeOverlay tells whether there is overlayfs.
func probeOverlay() error {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w: overlayfs: load it with `modprobe overlay`", ErrKernelTooOld)
	case errors.Is(err, unix.ENOSYS):
		// Blocked by a seccomp filter that does not know the call: every kernel that passed has it.
		return nil
	case err != nil:
		return fmt.Errorf("fsopen overlay (is this root, with CAP_SYS_ADMIN?): %w", err)
	}
	return unix.Close(fd)
}

// canUseLayers tries an overlay of the directories that Probe made in base. Nothing less tells: before overlayfs knew
// the mount API (Linux 6.5), the kernel took any parameter, and found out that it is none when the overlay was created.
func canUseLayers(base *os.File, set func(fsContext int, key string, dir *os.File) error) bool {
	fsContext, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(fsContext)
	for _, name := range probeNames {
		fd, err := unix.Openat(int(base.Fd()), name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return false
		}
		layer := os.NewFile(uintptr(fd), name)
		err = set(fsContext, "lowerdir+", layer)
		layer.Close()
		if err != nil {
			return false
		}
	}
	return unix.FsconfigCreate(fsContext) == nil
}

// canUseDetachedLayers tries whether overlayfs takes layers from a mount that is in no namespace.
func canUseDetachedLayers(dir string) bool {
	mount, err := detachedCopy(dir)
	if err != nil {
		return false
	}
	defer mount.Close()
	return canUseLayers(mount, setLayerFD)
}

func probeRequired(dir string) error {
	fd, err := unix.Openat2(unix.AT_FDCWD, dir, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC})
	if err != nil {
		if errors.Is(err, unix.ENOSYS) {
			return fmt.Errorf("%w: openat2 (Linux 5.6)", ErrKernelTooOld)
		}
		return fmt.Errorf("probe the kernel: openat2 %s: %w", dir, err)
	}
	defer unix.Close(fd)
	var stat unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_TYPE, &stat); err != nil {
		return fmt.Errorf("probe the kernel: statx %s: %w", dir, err)
	}
	if stat.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return fmt.Errorf("%w: the mount-root attribute of statx (Linux 5.8)", ErrKernelTooOld)
	}
	return nil
}

// procPath names an open directory by a path that cannot be made to lead elsewhere.
func procPath(f *os.File) string {
	return fmt.Sprintf("/proc/self/fd/%d", f.Fd())
}
