package layer

import (
	"context"
	"fmt"
	"os"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// PodVolumes resolves volume:// references: the other volumes of the pod that a view is for.
type PodVolumes struct {
	volumes *kubelet.PodVolumes
	forbid  Forbidden
}

// NewPodVolumes returns a resolver on kubelet's directory.
func NewPodVolumes(volumes *kubelet.PodVolumes, forbid Forbidden) *PodVolumes {
	return &PodVolumes{volumes: volumes, forbid: forbid}
}

// Open opens the directory that a volume:// reference names in another volume of the pod (O_PATH), and waits for
// kubelet to mount that volume. Links within the volume are followed, links out of it refused.
func (v *PodVolumes) Open(ctx context.Context, ref reference.Reference, pod Pod) (*os.File, error) {
	root, err := v.Root(ctx, ref, pod)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	dir, err := openBeneath(root, ref, 0)
	if err != nil {
		return nil, err
	}
	if err := v.forbid.check(root, dir); err != nil {
		dir.Close()
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return dir, nil
}

// Root opens the root of the volume that the reference names (O_PATH), whatever its path.
func (v *PodVolumes) Root(ctx context.Context, ref reference.Reference, pod Pod) (*os.File, error) {
	root, err := v.volumes.Open(ctx, pod, ref.Name())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ref, err)
	}
	return root, nil
}
