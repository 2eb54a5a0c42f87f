package layer

import (
	"context"
	"fmt"
	"os"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// PodVolumes resolves volume:// references, which name other volumes of the view's pod.
type PodVolumes struct {
	volumes   *kubelet.PodVolumes
	protected ProtectedDir
	questions questions
}

// NewPodVolumes returns a resolver of volume:// references.
func NewPodVolumes(volumes *kubelet.PodVolumes, protected ProtectedDir) *PodVolumes {
	return &PodVolumes{volumes: volumes, protected: protected}
}

// Open opens the directory that a volume:// reference names in another volume of the pod (O_PATH), and waits until kubelet has mounted
// that volume. It follows links within the volume, and returns ErrInvalidArgument for those that lead out of it, and
// ErrDoesNotAnswer if the file system does not answer.
func (v *PodVolumes) Open(ctx context.Context, ref reference.Reference, pod kubelet.Pod) (*os.File, error) {
	return v.openInTime(ctx, ref, pod, v.open)
}

// Root opens the root of the volume that the reference names (O_PATH). It ignores the path of the reference.
func (v *PodVolumes) Root(ctx context.Context, ref reference.Reference, pod kubelet.Pod) (*os.File, error) {
	return v.openInTime(ctx, ref, pod, v.root)
}

// openInTime calls open where the file system answers.
func (v *PodVolumes) openInTime(ctx context.Context, ref reference.Reference, pod kubelet.Pod,
	open func(ctx context.Context, ref reference.Reference, pod kubelet.Pod) (*os.File, error),
) (*os.File, error) {
	root := fmt.Sprintf("volume %s of pod %s (%s)", ref.Name(), pod, pod.UID)
	return v.questions.askOne(ctx, v.volumes.Wait()+patience, root, ref.Path(), func() (*os.File, error) { return open(ctx, ref, pod) })
}

func (v *PodVolumes) open(ctx context.Context, ref reference.Reference, pod kubelet.Pod) (*os.File, error) {
	root, err := v.root(ctx, ref, pod)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	dir, err := openBeneath(root, ref, linux.O_PATH|linux.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	if err := v.check(root, dir); err != nil {
		dir.Close()
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return dir, nil
}

func (v *PodVolumes) check(root, dir *os.File) error {
	rootStat, err := linux.StatFile(root)
	if err != nil {
		return err
	}
	stat, err := linux.StatFile(dir)
	if err != nil {
		return err
	}
	return v.protected.check(rootStat.ID(), dir, stat.ID())
}

func (v *PodVolumes) root(ctx context.Context, ref reference.Reference, pod kubelet.Pod) (*os.File, error) {
	root, err := v.volumes.Open(ctx, pod, ref.Name())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ref, err)
	}
	return root, nil
}
