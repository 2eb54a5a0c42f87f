package upper

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Upper is the writable side of one overlay: an upper directory and the work directory that overlayfs wants beside it.
//
// # Life cycle
//
//	absent ──Prepare──▶ in use ──Release──▶ at rest ──Discard──▶ absent
//	                      ▲                    │
//	                      └──────Prepare───────┘
//
// Absent: nothing was made, or everything was discarded. Exists returns false.
//
// In use: Prepare has returned. What the directories need is mounted (disk-image, tmpfs) or locked (pod-volume), and one
// overlay may be mounted on them. Prepare may be called again, and returns the same directories with Existed set.
//
// At rest: Release has returned. Nothing is mounted and no lock is held. What was written is still there, except in memory:
// a tmpfs is absent once it is released.
//
// Prepare, ClearWork, Hold, Yield, Release, Discard and Grow are called by one goroutine at a time, which holds the lock of the volume.
// The other methods may be called by any number of goroutines at any time, also during one of those seven: they then answer for the
// state before or after it.
//
//	method      absent      in use       at rest     errors of its own
//	Prepare     makes it    opens it     opens it    ResourceExhausted, FailedPrecondition, DataLoss, Unavailable
//	ClearWork   nothing     allowed¹     allowed
//	Hold                    allowed²
//	Yield       nothing     allowed¹     nothing
//	Release     nothing     allowed¹     nothing
//	Discard     nothing     allowed¹     allowed
//	Grow        NotFound³   allowed      NotFound⁴   InvalidArgument if the size is not the driver's to change
//	Usage       NotFound    allowed      NotFound⁴
//	DiskUsage   NotFound³   allowed      allowed
//	Free        NotFound    allowed      NotFound⁴
//	Exists      false       true         true
//	Check       NotFound    allowed      allowed     FailedPrecondition if it cannot be written to
//	Paths       allowed     allowed      allowed
//
//	¹ Only after the overlay on the upper has been unmounted.
//	² Only while the overlay on the upper is mounted.
//	³ A directory has no limit, and its Grow does nothing. DiskUsage is 0 of a backend that takes nothing of the data root's disk.
//	⁴ Of a disk image, whose file system is mounted only while it is in use. The next Prepare grows it to the limit. The other
//	  backends allow it.
//
// # Crashes
//
// The process may end between any two steps of any method. Each method finishes what an earlier call of it left undone. A method
// that fails restores the state before it: after Prepare has failed, only what was mounted or locked before still is. An upper is
// built under another name and renamed, so that it is either whole or absent. After a crash or a reboot the upper is at rest or in
// use, and Release or Prepare may follow.
//
// Errors are wrapped kinds of containerd/errdefs. Sizes are in bytes.
type Upper interface {
	// Prepare makes the upper if it is absent, with its limit and with a root directory that has the given attributes, and
	// opens its directories.
	Prepare(ctx context.Context, root RootAttr) (Dirs, error)
	// ClearWork empties the work directory.
	ClearWork() error
	// Hold keeps kubelet from unmounting the volume that holds the upper. An earlier process may have done so, and ended. It does
	// nothing for an upper in the data root.
	Hold() error
	// Yield lets kubelet unmount the volume that holds the upper. It does nothing for an upper in the data root.
	Yield() error
	// Release unmounts and unlocks what Prepare mounted and locked.
	Release(ctx context.Context) error
	// Discard releases the upper and moves what it has in the data root to the trash. What is in another volume of the pod
	// belongs to the pod, and stays.
	Discard(ctx context.Context) error
	// Grow raises the limit.
	Grow(ctx context.Context, limit Limit) error
	// Usage returns how much of its limit the upper takes, without the layers below it.
	Usage(ctx context.Context) (Usage, error)
	// DiskUsage returns how many bytes the upper takes of the data root's disk.
	DiskUsage(ctx context.Context) (int64, error)
	// Free returns the total and what is left of it: within the limit where there is one, else in the file system. Unlike
	// Usage it never reads the tree, and Used may be that of the whole file system.
	Free(ctx context.Context) (Usage, error)
	// Exists reports whether the upper has been made.
	Exists() (bool, error)
	// Check returns what is wrong with an upper that should exist: NotFound if it is gone, FailedPrecondition if it cannot be
	// written to. A disk image at rest is only looked for.
	Check() error
	// Paths returns the paths of the upper and work directories.
	Paths() (upper, work string)
}

// Dirs are the directories of an upper in use.
type Dirs struct {
	// Upper and Work are open directories (O_PATH) of one file system, reached through one mount.
	Upper, Work *os.File
	// Existed reports whether the upper was there before: it may have content, or an overlay mounted on it.
	Existed bool
}

// Sync writes to the disk that the upper exists: what is recorded of it afterwards holds after a power cut.
func (d Dirs) Sync() error {
	base, err := linux.Open(d.Upper, "..", linux.O_PATH|linux.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("sync an upper: %w", err)
	}
	defer base.Close()
	if err := errors.Join(linux.SyncDir(d.Upper), linux.SyncDir(base)); err != nil {
		return fmt.Errorf("sync an upper: %w", err)
	}
	return nil
}

// Close closes the handles. The directories remain.
func (d Dirs) Close() {
	d.Upper.Close()
	d.Work.Close()
}
