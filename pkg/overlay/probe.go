package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// ErrKernelTooOld says that the kernel lacks something that the driver needs.
var ErrKernelTooOld = errors.New("the kernel lacks a feature that overlay-csi needs")

// probeNames are two directories that Probe makes to configure an overlay of them.
var probeNames = []string{"probe-1", "probe-2"}

// Probe finds out what the kernel can do by doing it: it configures overlays of directories that it makes in dir, and closes them
// before anything is mounted. It returns ErrKernelTooOld if the driver cannot work at all.
func Probe(dir string) (Features, error) {
	p, err := newProber(dir)
	if err != nil {
		return Features{}, fmt.Errorf("probe the kernel: %w", err)
	}
	defer p.close()
	var features Features
	for _, feature := range slices.Backward(kernelFeatures) {
		if features.has(feature.Needs) {
			err := feature.probe(p)
			*feature.field(&features) = err == nil
			features.NoNamespaces = features.NoNamespaces || errors.Is(err, errNoNamespace)
		}
	}
	return features, nil
}

// prober tries features in a directory that has two others in it.
type prober struct{ dir *os.File }

// newProber checks what the driver needs, and makes the directories to try the rest.
func newProber(path string) (*prober, error) {
	dir, err := linux.OpenDir(path)
	if errors.Is(err, syscall.ENOSYS) {
		return nil, fmt.Errorf("%w: openat2 (Linux 5.6)", ErrKernelTooOld)
	}
	if err != nil {
		return nil, err
	}
	p := &prober{dir: dir}
	if err := p.prepare(); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *prober) close() { p.dir.Close() }

func (p *prober) prepare() error {
	if has, err := linux.HasMountRootAttribute(p.dir); err != nil {
		return err
	} else if !has {
		return fmt.Errorf("%w: the mount-root attribute of statx (Linux 5.8)", ErrKernelTooOld)
	}
	if err := checkOverlayFS(); err != nil {
		return err
	}
	for _, name := range probeNames {
		path := filepath.Join(p.dir.Name(), name)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		// A process that was killed while it probed may have left a mount there.
		if err := linux.UnmountLazily(path); err != nil && !errors.Is(err, syscall.EINVAL) {
			return err
		}
	}
	return nil
}

// checkOverlayFS checks that the kernel has overlayfs.
func checkOverlayFS() error {
	context, err := linux.Fsopen(fsType)
	switch {
	case errors.Is(err, syscall.ENODEV):
		return fmt.Errorf("%w: overlayfs; load it with `modprobe overlay`", ErrKernelTooOld)
	case errors.Is(err, syscall.ENOSYS):
		// A seccomp filter that does not know the call blocks it: every kernel that passed so far has it.
		return nil
	case err != nil:
		return fmt.Errorf("%w (this needs root with CAP_SYS_ADMIN)", err)
	}
	return context.Close()
}

func (p *prober) mountAPI() error { return configure(p.dir, (*linux.FSContext).SetPath) }

func (p *prober) layerFD() error { return configure(p.dir, (*linux.FSContext).SetFile) }

func (p *prober) detachedLayer() error {
	mount, err := detachedCopy(p.dir.Name())
	if err != nil {
		return err
	}
	defer mount.Close()
	return configure(mount, (*linux.FSContext).SetFile)
}

// idMappedUpper makes an overlay of ID-mapped lowers: overlayfs takes uppers since it takes these, and an overlay with an upper would
// write to the disk, which may be full.
func (p *prober) idMappedUpper() error {
	namespace, err := newNamespace(idMaps{mapping(), mapping(Swap{0, 1})})
	if err != nil {
		return err
	}
	defer namespace.Close()
	mapped, err := mapMount(p.dir, "", linux.MountAttrReadOnly, namespace)
	if err != nil {
		return err
	}
	defer mapped.Close()
	if configureByPath(mapped) == nil {
		return nil
	}
	return p.attachedLayer(mapped)
}

// attachedLayer makes an overlay of the two directories on a detached mount, which has to be attached before Linux 6.15.
func (p *prober) attachedLayer(mapped *os.File) error {
	// On a directory that is there: no new one can be made on a full disk, and that would be taken for an answer of the kernel.
	path := filepath.Join(p.dir.Name(), probeNames[0])
	target, err := linux.OpenDir(path)
	if err != nil {
		return err
	}
	defer target.Close()
	if err := attach(mapped, target); err != nil {
		return err
	}
	return errors.Join(configureByPath(mapped), linux.UnmountLazily(path))
}

// configureByPath makes an overlay of the two directories in base by the parameters that every kernel knows.
func configureByPath(base *os.File) error {
	var paths []string
	for _, name := range probeNames {
		layer, err := linux.OpenDirAt(base, name)
		if err != nil {
			return err
		}
		defer layer.Close()
		paths = append(paths, linux.ProcPath(layer))
	}
	context, err := linux.Fsopen(fsType)
	if err != nil {
		return err
	}
	defer context.Close()
	if err := context.SetString("lowerdir", strings.Join(paths, ":")); err != nil {
		return err
	}
	return context.Create()
}

func (p *prober) statMount() error {
	stat, err := linux.StatMount(p.dir, "")
	if err != nil {
		return err
	}
	if !stat.Unique {
		return errors.New("statx returns no unique mount ID")
	}
	_, err = linux.Statmount(stat.MountID)
	return err
}

// configure makes an overlay of the two directories in base, which set hands to overlayfs. Less than that shows nothing: before
// overlayfs knew the mount API (Linux 6.5), the kernel took any parameter, and refused unknown ones when the overlay was created.
func configure(base *os.File, set func(context *linux.FSContext, key string, dir *os.File) error) error {
	context, err := linux.Fsopen(fsType)
	if err != nil {
		return err
	}
	defer context.Close()
	for _, name := range probeNames {
		layer, err := linux.OpenDirAt(base, name)
		if err != nil {
			return err
		}
		err = set(context, "lowerdir+", layer)
		layer.Close()
		if err != nil {
			return err
		}
	}
	return context.Create()
}
