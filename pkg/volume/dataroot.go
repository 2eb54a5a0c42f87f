package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// ErrInUse says that another driver process has the data root.
var ErrInUse = errors.New("another overlay-csi process uses this data root")

// DataRoot is the directory that has everything the driver keeps, taken for this process.
type DataRoot struct {
	path string
	lock *os.File
	// dir is the directory on the mount that uppers are used on.
	dir   *os.File
	trash *trash
}

// OpenDataRoot takes a data root, and makes it where it is missing. It is ErrInUse while another process has it; any
// other error says why it cannot hold uppers.
func OpenDataRoot(path string) (*DataRoot, error) {
	for _, dir := range []string{volumesName, trashName} {
		if err := os.MkdirAll(filepath.Join(path, dir), 0o700); err != nil {
			return nil, fmt.Errorf("prepare the data root: %w", err)
		}
	}
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("resolve the data root: %w", err)
	}
	lock, err := lockDir(path)
	if err != nil {
		return nil, err
	}
	if err := upper.Probe(lock); err != nil {
		lock.Close()
		return nil, fmt.Errorf("data root: %w", err)
	}
	return &DataRoot{path: path, lock: lock, dir: lock, trash: newTrash(filepath.Join(path, trashName))}, nil
}

// UseMount has uppers used through quiet, the same directory on another mount. The data root closes it.
func (r *DataRoot) UseMount(quiet *os.File) { r.dir = quiet }

// Path is the data root's path, absolute and without links.
func (r *DataRoot) Path() string { return r.path }

// Dir is the data root, open. It belongs to the data root.
func (r *DataRoot) Dir() *os.File { return r.dir }

// Discard moves a file or directory of the data root to the trash. What does not exist is already gone.
func (r *DataRoot) Discard(path string) error { return r.trash.put(path) }

// Close lets go of the data root. Views stay mounted.
func (r *DataRoot) Close() error {
	if r.dir != r.lock {
		r.dir.Close()
	}
	return r.lock.Close()
}

// lockDir takes a directory for this process. The kernel lets go of it when the process ends, however it ends.
func lockDir(path string) (*os.File, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the data root: %w", err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrInUse, path)
		}
		return nil, fmt.Errorf("lock the data root %s: %w", path, err)
	}
	return dir, nil
}
