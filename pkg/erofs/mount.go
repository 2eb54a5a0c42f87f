package erofs

import (
	"fmt"
	"os"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Mount mounts an image of two files without a loop device. It returns the root of the mount, which is read-only and at no path: it ends
// when the handle is closed, and nothing else holds it. The files may be closed before.
//
// The error wraps ENOTBLK before Linux 6.12, where the kernel was built without CONFIG_EROFS_FS_BACKED_BY_FILE, and where the files are on
// a file system that the kernel takes no images from, such as tmpfs. It wraps ENODEV where the kernel has no EROFS.
func Mount(metadata, data *os.File) (*os.File, error) {
	context, err := linux.Fsopen("erofs")
	if err != nil {
		return nil, fmt.Errorf("mount an EROFS image: %w", err)
	}
	defer context.Close()
	mounted, err := configure(context, metadata, data)
	if err != nil {
		return nil, fmt.Errorf("mount the EROFS image %s: %w", metadata.Name(), err)
	}
	return mounted, nil
}

func configure(context *linux.FSContext, metadata, data *os.File) (*os.File, error) {
	// The kernel opens the files by these names, once. It takes no descriptors for them.
	if err := context.SetPath("source", metadata); err != nil {
		return nil, err
	}
	if err := context.SetPath("device", data); err != nil {
		return nil, err
	}
	if err := context.SetFlag("ro"); err != nil {
		return nil, err
	}
	if err := context.Create(); err != nil {
		return nil, err
	}
	return context.Mount(linux.MountAttrReadOnly)
}
