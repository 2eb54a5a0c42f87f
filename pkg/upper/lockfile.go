package upper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// lockName is the file beside an upper in another volume of the pod:
//
//	<volume>/<path>/overlay-csi.json
//	<volume>/<path>/upper/
//	<volume>/<path>/work/
//
// It outlives the view, since the upper must not be used with other layers later. The holder in it is a lock: it is written before
// the overlay is mounted and removed after it is unmounted, so that it is still there after a crash.
const lockName = "overlay-csi.json"

// maxLockFile bounds what is read of a file that the pod can write: 500 references of the longest kind.
const maxLockFile = 8 << 20

type lockFile struct {
	// Layers are the references of the layers that the upper was made on, the topmost first.
	Layers []string `json:"layers"`
	// Holder is nil while no view uses the upper.
	Holder *LockHolder `json:"holder,omitempty"`
}

// LockHolder is one view on one node during one boot.
type LockHolder struct {
	Node     string `json:"node"`
	BootID   string `json:"bootID"`
	VolumeID string `json:"volumeID"`
	Target   string `json:"target"`
}

// readLockFile returns existed false if there is no lock file. The pod can make anything of that name: it is opened for reading only
// once it is known to be a regular file, because opening a device may act on it or load a module.
func readLockFile(dir *os.File) (file lockFile, existed bool, err error) {
	handle, err := linux.Open(dir, lockName, linux.O_PATH|linux.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return lockFile{}, false, nil
	}
	if err != nil {
		return lockFile{}, false, err
	}
	defer handle.Close()
	stat, err := linux.StatFile(handle)
	if err != nil {
		return lockFile{}, false, err
	}
	if !stat.IsRegular() {
		return lockFile{}, false, fmt.Errorf("%w: it is not a regular file", errdefs.ErrFailedPrecondition)
	}
	reader, err := linux.Reopen(handle, os.O_RDONLY)
	if err != nil {
		return lockFile{}, false, err
	}
	defer reader.Close()
	if err := json.NewDecoder(io.LimitReader(reader, maxLockFile)).Decode(&file); err != nil {
		return lockFile{}, false, fmt.Errorf("%w: the driver did not write it: %s", errdefs.ErrFailedPrecondition, quote(err.Error()))
	}
	return file, true, nil
}

// writeLockFile replaces the whole file, and returns once it is on the disk.
func writeLockFile(dir *os.File, file lockFile) error {
	data, err := json.Marshal(file)
	if err != nil {
		return fmt.Errorf("encode %s: %w", lockName, err)
	}
	return linux.WriteFileAtomic(dir, lockName, data, true)
}

// lock locks the upper for the holder. It fails if the upper was made on other layers, or if the file system cannot hold one.
func (p podVolume) lock(ctx context.Context, base *os.File) error {
	return p.withLockFile(ctx, base, func(file lockFile, existed bool) error {
		if !existed {
			if err := Probe(base); err != nil {
				return err
			}
		}
		if existed && !slices.Equal(file.Layers, p.layers) {
			return p.wrap("lock it", fmt.Errorf("%w: it was made on other layers (%s), and overlayfs supports an upper only on the layers "+
				"that it was made on; name these layers, or another path", errdefs.ErrFailedPrecondition, quoteSome(file.Layers)))
		}
		if file.Holder != nil && *file.Holder == p.holder {
			return nil
		}
		if err := p.checkStale(file.Holder, base); err != nil {
			return err
		}
		return writeLockFile(base, lockFile{Layers: p.layers, Holder: &p.holder})
	})
}

// checkStale returns nil if there is no holder, or if a crash left it behind.
func (p podVolume) checkStale(holder *LockHolder, base *os.File) error {
	switch {
	case holder == nil:
		return nil
	case holder.Node == p.holder.Node && holder.BootID != p.holder.BootID:
		return nil
	case holder.Node == p.holder.Node && !p.holders.inUse(*holder):
		return nil
	case holder.Node != p.holder.Node && isNodeLocal(base):
		return nil
	}
	return p.wrap("lock it", fmt.Errorf("%w: volume %s on node %s uses it (published at %s), and two overlays never share one upper; "+
		"name another path, or remove %s there once nothing uses it",
		errdefs.ErrFailedPrecondition, quote(holder.VolumeID), quote(holder.Node), quote(holder.Target), lockName))
}

// maxQuoted is how many bytes of a text of the pod stand in a message, and maxQuotedLayers how many layers. Escaped, they are four
// times as long.
const (
	maxQuoted       = 200
	maxQuotedLayers = 3
)

// quote quotes the beginning of a text that the pod wrote.
func quote(text string) string {
	if len(text) > maxQuoted {
		return strconv.Quote(text[:maxQuoted]) + "…"
	}
	return strconv.Quote(text)
}

// quoteSome quotes the first of the layers that the pod wrote.
func quoteSome(layers []string) string {
	var quoted []string
	for _, layer := range layers[:min(len(layers), maxQuotedLayers)] {
		quoted = append(quoted, quote(layer))
	}
	if more := len(layers) - len(quoted); more > 0 {
		quoted = append(quoted, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(quoted, ", ")
}

// unlock removes the holder from the lock file.
func (p podVolume) unlock(ctx context.Context, volume *os.File) error {
	base, err := p.open(volume, p.at.Path)
	if isMoved(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer base.Close()
	return p.withLockFile(ctx, base, func(file lockFile, existed bool) error {
		if !existed || file.Holder == nil || *file.Holder != p.holder {
			return nil
		}
		return writeLockFile(base, lockFile{Layers: file.Layers})
	})
}

// withLockFile reads the lock file and calls do with it, while no other process and no other volume does the same.
func (p podVolume) withLockFile(ctx context.Context, base *os.File, do func(file lockFile, existed bool) error) error {
	dir, err := linux.Open(base, ".", os.O_RDONLY|linux.O_DIRECTORY, 0)
	if err != nil {
		return p.wrap("open it", err)
	}
	defer dir.Close()
	if err := waitForFlock(ctx, dir); err != nil {
		return p.wrap("lock it (flock)", err)
	}
	file, existed, err := readLockFile(dir)
	if err != nil {
		return p.wrap("read "+lockName, err)
	}
	return do(file, existed)
}

const (
	// flockWait is the maximum time that an operation waits for the flock of a directory. Another overlay volume has it for
	// milliseconds. A pod that has it for longer makes the operations on its own volumes fail, which are repeated.
	flockWait = 5 * time.Second
	// flockInterval is the time between two tries.
	flockInterval = 5 * time.Millisecond
)

// waitForFlock takes the lock of an open directory. It returns ErrUnavailable if another process has it for flockWait. ctx may have no
// end: a publish that has failed is undone although nobody waits for it.
func waitForFlock(ctx context.Context, dir *os.File) error {
	limited, cancel := context.WithTimeout(ctx, flockWait)
	defer cancel()
	for {
		err := linux.Flock(dir)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		select {
		case <-time.After(flockInterval):
		case <-limited.Done():
			if err := ctx.Err(); err != nil {
				return err
			}
			return fmt.Errorf("%w: %s has locked the directory for %s; end it, or name another path",
				errdefs.ErrUnavailable, flockHolder(dir), flockWait)
		}
	}
}

// flockHolder says which process has the lock of a directory.
func flockHolder(dir *os.File) string {
	pid, err := linux.FlockHolder(dir)
	if err != nil {
		return "another process"
	}
	// The process chooses its name, of at most 15 bytes.
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return fmt.Sprintf("process %d", pid)
	}
	return fmt.Sprintf("process %d (%s)", pid, quote(strings.TrimSuffix(string(name), "\n")))
}
