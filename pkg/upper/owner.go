package upper

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ownerName is the file beside an upper in another volume that says what the upper belongs to:
//
//	<volume>/<path>/overlay-csi.json
//	<volume>/<path>/upper/
//	<volume>/<path>/work/
//
// It outlives the view, since the upper must not meet other layers later. The owner in it is the lock: it is written
// before the overlay is mounted and taken out after it is unmounted, so that it is still there after a crash.
const ownerName = "overlay-csi.json"

// maxOwnerFile bounds what is read of a file that the pod can write: 500 references of the longest kind.
const maxOwnerFile = 8 << 20

type ownerFile struct {
	// Layers are the references of the layers that the upper was made on, the topmost first.
	Layers []string `json:"layers"`
	// Owner is nil while no view uses the upper.
	Owner *Owner `json:"owner,omitempty"`
}

// Owner is one view on one node during one boot.
type Owner struct {
	Node     string `json:"node"`
	BootID   string `json:"bootID"`
	VolumeID string `json:"volumeID"`
	Target   string `json:"target"`
}

func readOwnerFile(dir *os.File) (file ownerFile, existed bool, err error) {
	fd, err := unix.Openat(int(dir.Fd()), ownerName, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return ownerFile{}, false, nil
	}
	if err != nil {
		return ownerFile{}, false, err
	}
	reader := os.NewFile(uintptr(fd), dir.Name()+"/"+ownerName)
	defer reader.Close()
	if info, err := reader.Stat(); err != nil || !info.Mode().IsRegular() {
		return ownerFile{}, false, fmt.Errorf("%w: it is no regular file (%w)", errdefs.ErrFailedPrecondition, errors.Join(err))
	}
	if err := json.NewDecoder(io.LimitReader(reader, maxOwnerFile)).Decode(&file); err != nil {
		return ownerFile{}, false, fmt.Errorf("%w: it is not what the driver wrote: %w", errdefs.ErrFailedPrecondition, err)
	}
	return file, true, nil
}

// writeOwnerFile replaces the file whole, and has it on the disk before it returns.
func writeOwnerFile(dir *os.File, file ownerFile) error {
	data, err := json.Marshal(file)
	if err != nil {
		return fmt.Errorf("encode %s: %w", ownerName, err)
	}
	const temporary = ownerName + ".new"
	if err := unix.Unlinkat(int(dir.Fd()), temporary, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &os.PathError{Op: "unlink", Path: dir.Name() + "/" + temporary, Err: err}
	}
	fd, err := unix.Openat(int(dir.Fd()), temporary, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: dir.Name() + "/" + temporary, Err: err}
	}
	writer := os.NewFile(uintptr(fd), dir.Name()+"/"+temporary)
	_, err = writer.Write(data)
	if err := errors.Join(err, writer.Sync(), writer.Close()); err != nil {
		return fmt.Errorf("write %s: %w", temporary, err)
	}
	if err := unix.Renameat(int(dir.Fd()), temporary, int(dir.Fd()), ownerName); err != nil {
		return &os.PathError{Op: "rename", Path: dir.Name() + "/" + temporary, Err: err}
	}
	return nil
}
