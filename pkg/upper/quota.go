package upper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// quota is an upper whose directory has a project of ext4 or xfs: what is made in it belongs to the project, and the file
// system keeps the project to its limit (Linux, Documentation/filesystems/quota.rst; xfs_quota(8), "Project quota").
type quota struct {
	Dir
	projects *projects
	limit    Limit
}

// Prepare gives the directory its project and the limit before there is an upper in it.
func (q quota) Prepare(ctx context.Context, root Root) (Dirs, error) {
	if err := unix.Mkdirat(int(q.root.Fd()), q.base, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return Dirs{}, fmt.Errorf("make the upper's directory %s: %w", q.path(), err)
	}
	if err := q.Grow(ctx, q.limit); err != nil {
		return Dirs{}, err
	}
	return q.Dir.Prepare(ctx, root)
}

// Grow sets the limit.
func (q quota) Grow(_ context.Context, limit Limit) error {
	dir, err := q.open(unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer dir.Close()
	return q.projects.limit(dir, limit)
}

// Discard discards the directory. Its project is free for another when the last file of it is deleted.
func (q quota) Discard(discard func(path string) error) error { return discard(q.path()) }

// Usage asks the file system.
func (q quota) Usage(ctx context.Context) (Usage, error) {
	counted, err := q.counted()
	if err != nil {
		return Usage{}, err
	}
	usage, err := FileSystemUsage(q.path())
	if err != nil {
		return Usage{}, err
	}
	usage.Bytes = within(usage.Bytes, int64(counted.blockLimit)<<10, int64(counted.space))
	usage.Inodes = within(usage.Inodes, int64(counted.inodeLimit), int64(counted.inodes))
	return usage, nil
}

// Free is what Usage says: nothing is counted for it.
func (q quota) Free(ctx context.Context) (Usage, error) { return q.Usage(ctx) }

// within is what a limit leaves of a file system's amount.
func within(all Amount, limit, used int64) Amount {
	if limit == 0 {
		return Amount{Total: used + all.Available, Used: used, Available: all.Available}
	}
	limited := amount(limit, used)
	limited.Available = min(limited.Available, all.Available)
	return limited
}

// Taken is what the file system has counted.
func (q quota) Taken(context.Context) (int64, error) {
	counted, err := q.counted()
	return int64(counted.space), err
}

func (q quota) counted() (dqblk, error) {
	dir, err := q.open(unix.O_RDONLY)
	if err != nil {
		return dqblk{}, err
	}
	defer dir.Close()
	attributes, err := getProject(dir)
	if err != nil {
		return dqblk{}, err
	}
	return q.projects.get(attributes.project)
}

// Project IDs are of the driver's own range, which begins with the letters "o" and "v": kubelet takes those from 1048577,
// and people small ones.
const (
	firstProject = 0x6f760000
	lastProject  = 0x6f76ffff
)

// projects are the projects of a file system.
type projects struct {
	root *os.File
	mu   sync.Mutex
	next uint32
}

func newProjects(root *os.File) *projects { return &projects{root: root, next: firstProject} }

// probe finds out whether the file system counts projects and keeps them to limits.
func (p *projects) probe() error {
	var state quotaState
	if err := p.quotactl(qXGetQStat, 0, unsafe.Pointer(&state)); err != nil {
		return fmt.Errorf("the file system has no project quota (mount it with prjquota): quotactl_fd: %w", err)
	}
	if state.flags&quotaProjectCounted == 0 || state.flags&quotaProjectEnforced == 0 {
		return errors.New("the file system has its project quota switched off: mount it with prjquota")
	}
	dir, err := os.Open(p.root.Name())
	if err != nil {
		return err
	}
	defer dir.Close()
	attributes, err := getProject(dir)
	if err == nil && attributes.project != 0 {
		return fmt.Errorf("the data root belongs to project %d: what is in it counts there", attributes.project)
	}
	return err
}

// limit gives a directory a project of its own where it has none, and the project its limit.
func (p *projects) limit(dir *os.File, limit Limit) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	attributes, err := getProject(dir)
	if err != nil {
		return err
	}
	if attributes.project != 0 {
		return p.set(attributes.project, limit)
	}
	id, err := p.free()
	if err != nil {
		return err
	}
	if err := p.set(id, limit); err != nil {
		return err
	}
	attributes.project = id
	attributes.flags |= inheritProject
	return setProject(dir, attributes)
}

// free finds a project that nothing belongs to: the file system itself says so, whatever else was forgotten.
func (p *projects) free() (uint32, error) {
	for range lastProject - firstProject + 1 {
		id := p.next
		if p.next++; p.next > lastProject {
			p.next = firstProject
		}
		counted, err := p.get(id)
		if err != nil {
			return 0, err
		}
		if counted.inodes == 0 && counted.space == 0 {
			return id, nil
		}
	}
	return 0, fmt.Errorf("%w: all %d projects of %s are in use", errdefs.ErrResourceExhausted, lastProject-firstProject+1, p.root.Name())
}

func (p *projects) set(id uint32, limit Limit) error {
	value := dqblk{blockLimit: uint64((limit.Bytes + 1023) >> 10), inodeLimit: uint64(limit.Inodes), valid: validLimits}
	if err := p.quotactl(qSetQuota, id, unsafe.Pointer(&value)); err != nil {
		return fmt.Errorf("limit project %d of %s: quotactl_fd: %w", id, p.root.Name(), err)
	}
	return nil
}

// get is what a project has. One that nothing is known of has nothing.
func (p *projects) get(id uint32) (dqblk, error) {
	var value dqblk
	err := p.quotactl(qGetQuota, id, unsafe.Pointer(&value))
	if errors.Is(err, unix.ENOENT) {
		return dqblk{}, nil
	}
	if err != nil {
		return dqblk{}, fmt.Errorf("ask for project %d of %s: quotactl_fd: %w", id, p.root.Name(), err)
	}
	return value, nil
}

// What follows is from include/uapi/linux/quota.h, dqblk_xfs.h and fs.h: golang.org/x/sys has none of it, and the libraries
// for project quotas need cgo.
const (
	qGetQuota            = 0x800007
	qSetQuota            = 0x800008
	qXGetQStat           = 'X'<<8 + 5
	projectQuota         = 2
	validLimits          = 1 | 4
	quotaProjectCounted  = 1 << 4
	quotaProjectEnforced = 1 << 5
	inheritProject       = 0x200
	fsIOCGetXattr        = 0x801c581f
	fsIOCSetXattr        = 0x401c5820
)

// dqblk is struct if_dqblk: limits of space are in KiB, the space itself in bytes.
type dqblk struct {
	blockLimit, blockSoftLimit, space  uint64
	inodeLimit, inodeSoftLimit, inodes uint64
	blockTime, inodeTime               uint64
	valid                              uint32
	_                                  uint32
}

// quotaState is the head of struct fs_quota_stat; the kernel writes 80 bytes.
type quotaState struct {
	version int8
	_       int8
	flags   uint16
	_       [76]byte
}

// quotactl is quotactl_fd(2) (Linux 5.14): it needs no block device, which a container has not.
func (p *projects) quotactl(command uintptr, id uint32, value unsafe.Pointer) error {
	// O_PATH is not enough.
	dir, err := os.Open(p.root.Name())
	if err != nil {
		return err
	}
	defer dir.Close()
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, dir.Fd(), command<<8|projectQuota, uintptr(id), uintptr(value), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// fsxattr is struct fsxattr.
type fsxattr struct {
	flags, extentSize, extents, project, cowExtentSize uint32
	_                                                  [8]byte
}

func getProject(dir *os.File) (fsxattr, error) {
	var attributes fsxattr
	if err := ioctl(dir, fsIOCGetXattr, unsafe.Pointer(&attributes)); err != nil {
		return attributes, fmt.Errorf("read the project of %s: %w", dir.Name(), err)
	}
	return attributes, nil
}

func setProject(dir *os.File, attributes fsxattr) error {
	if err := ioctl(dir, fsIOCSetXattr, unsafe.Pointer(&attributes)); err != nil {
		return fmt.Errorf("set the project of %s: %w", dir.Name(), err)
	}
	return nil
}

func ioctl(file *os.File, request uintptr, value unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), request, uintptr(value)); errno != 0 {
		return errno
	}
	return nil
}
