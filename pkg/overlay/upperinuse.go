package overlay

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// ErrUpperInUse says that the kernel has another overlay on the same upper directory.
var ErrUpperInUse = errors.New("another overlay is mounted on this upper directory")

// UpperInUse reports whether any overlay in the kernel has this directory as its upper, in whatever mount namespace, or in one that
// cannot be reached any more. It configures an overlay that cannot exist: with an index, the kernel refuses an upper that is in use
// (EBUSY) before it finds that the work directory is the upper itself (EINVAL).
func (m *Mounter) UpperInUse(upper *os.File) (bool, error) {
	probe := m.probeUpperWithMount
	if m.features.MountAPI {
		probe = m.probeUpperWithAPI
	}
	err := probe(upper)
	switch {
	case errors.Is(err, syscall.EBUSY):
		return true, nil
	case errors.Is(err, syscall.EINVAL):
		return false, nil
	case err == nil:
		return false, fmt.Errorf("probe upper %s: the kernel took an impossible overlay", upper.Name())
	}
	return false, fmt.Errorf("probe upper %s: %w", upper.Name(), err)
}

func (m *Mounter) probeUpperWithAPI(upper *os.File) error {
	context, err := linux.Fsopen(fsType)
	if err != nil {
		return err
	}
	defer context.Close()
	if err := m.setDir(context, "lowerdir+", m.empty[0]); err != nil {
		return err
	}
	for _, key := range []string{"upperdir", "workdir"} {
		if err := m.setDir(context, key, upper); err != nil {
			return err
		}
	}
	if err := context.SetString("index", "on"); err != nil {
		return err
	}
	return context.Create()
}

func (m *Mounter) probeUpperWithMount(upper *os.File) error {
	target := linux.ProcPath(m.empty[0])
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%[2]s,index=on", target, linux.ProcPath(upper))
	if err := linux.Mount(mountSource, target, fsType, 0, options); err != nil {
		return err
	}
	return linux.DetachFile(m.empty[0])
}
