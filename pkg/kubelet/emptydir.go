package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// emptyDirPlugin has directories with the names of the pod's volumes, never those of PersistentVolumes.
const emptyDirPlugin = "kubernetes.io~empty-dir"

// openEmptyDir opens an emptyDir. It returns fs.ErrNotExist if kubelet has no such directory, and errNotMounted if kubelet has not
// finished setting it up.
//
// Kubelet then makes a file "ready" in its own data, after it has mounted a tmpfs where the medium is memory. The file and the directory
// outlive a reboot, but the tmpfs does not, and kubelet itself looks for the mount (pkg/volume/emptydir). So an emptyDir without a mount
// is taken only if it cannot be one in memory.
func (v *PodVolumes) openEmptyDir(ctx context.Context, volume *search) (*os.File, error) {
	podDir := v.podDir(volume.pod)
	// What is mounted before the file is looked at is in the directory that is opened after it.
	ready, errReady := os.Lstat(filepath.Join(podDir, "plugins", emptyDirPlugin, volume.name, "ready"))
	root, err := linux.Open(nil, filepath.Join(podDir, "volumes", emptyDirPlugin, volume.name),
		linux.O_PATH|linux.O_DIRECTORY|linux.O_NOFOLLOW, linux.ResolveNoMagicLinks)
	if err != nil {
		return nil, err
	}
	if err = errReady; err == nil {
		err = v.checkMedium(ctx, volume, root, ready.ModTime())
	} else if ignoreNotExist(err) == nil {
		err = errNotMounted
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// checkMedium returns errNotMounted if kubelet may still mount a file system on the emptyDir, which it called ready at that time.
func (v *PodVolumes) checkMedium(ctx context.Context, volume *search, root *os.File, ready time.Time) error {
	mounted, err := linux.IsMountRoot(root, "")
	if err != nil || mounted {
		return err
	}
	sinceBoot, err := linux.TimeSinceBoot()
	if err != nil {
		return err
	}
	// A time in the future is one of a clock that was wrong, and says nothing.
	if age := time.Since(ready); age >= 0 && age < sinceBoot {
		return nil
	}
	if volume.known == nil && volume.mediumErr == nil {
		known, err := v.ask(ctx, volume)
		if err != nil {
			volume.mediumErr = err
		} else {
			volume.known = &known
		}
	}
	if volume.known != nil {
		if volume.known.InMemory {
			return fmt.Errorf("%w since the node was started, and its medium is not the disk", errNotMounted)
		}
		return nil
	}
	// Nobody writes to the directory beneath a tmpfs.
	empty, err := isEmpty(root)
	if err != nil || !empty {
		return err
	}
	return fmt.Errorf("%w since the node was started, if its medium is memory, which is not known (%v)", errNotMounted, volume.mediumErr)
}

func isEmpty(root *os.File) (bool, error) {
	dir, err := linux.Open(root, ".", os.O_RDONLY|linux.O_DIRECTORY, 0)
	if err != nil {
		return false, err
	}
	defer dir.Close()
	_, err = dir.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}
