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

// projectQuota is an upper in a directory that belongs to a project of ext4 or xfs. What is made in it belongs to the project
// as well, and the file system enforces the project's limit (Linux, Documentation/filesystems/quota.rst; xfs_quota(8),
// "Project quota").
type projectQuota struct {
	directory
	projects *projects
	limit    Limit
}

// Prepare sets the directory's project and limit before there is an upper in it.
func (q projectQuota) Prepare(ctx context.Context, root RootAttr) (Dirs, error) {
	if err := unix.Mkdirat(int(q.root.Fd()), q.base, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return Dirs{}, fmt.Errorf("make the upper's directory %s: %w", q.path(), err)
	}
	if err := q.Grow(ctx, q.limit); err != nil {
		return Dirs{}, err
	}
	return q.directory.Prepare(ctx, root)
}

func (q projectQuota) Grow(_ context.Context, limit Limit) error {
	dir, err := q.open(unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer dir.Close()
	return q.projects.limit(dir, limit)
}

// Discard discards the whole directory. Its project is free again when the last file of it is deleted.
func (q projectQuota) Discard(context.Context) error { return q.discard(q.path()) }

// Usage returns what the file system has counted for the project.
func (q projectQuota) Usage(context.Context) (Usage, error) {
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

func (q projectQuota) Free(ctx context.Context) (Usage, error) { return q.Usage(ctx) }

func (q projectQuota) DiskUsage(context.Context) (int64, error) {
	counted, err := q.counted()
	return int64(counted.space), err
}

func (q projectQuota) counted() (dqblk, error) {
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

// The driver takes project IDs from a range of its own, whose first bytes are the letters "ov". kubelet takes IDs from 1048577,
// and people take small ones.
const (
	firstProject = 0x6f760000
	lastProject  = 0x6f76ffff
)

// projects allocates and limits the projects of one file system.
type projects struct {
	root *os.File
	mu   sync.Mutex
	next uint32
}

func newProjects(root *os.File) *projects { return &projects{root: root, next: firstProject} }

// probe returns nil if the file system counts projects and enforces their limits.
func (p *projects) probe() error {
	var state quotaState
	if err := p.quotactl(qXGetQStat, 0, unsafe.Pointer(&state)); err != nil {
		return fmt.Errorf("the file system has no project quota (mount it with prjquota): quotactl_fd: %w", err)
	}
	if state.flags&quotaProjectCounted == 0 || state.flags&quotaProjectEnforced == 0 {
		return errors.New("the project quota of the file system is off (mount it with prjquota)")
	}
	dir, err := os.Open(p.root.Name())
	if err != nil {
		return err
	}
	defer dir.Close()
	attributes, err := getProject(dir)
	if err == nil && attributes.project != 0 {
		return fmt.Errorf("the data root itself belongs to project %d", attributes.project)
	}
	return err
}

// limit gives a directory a project of its own if it has none, and sets the project's limit.
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

// free returns a project that no file belongs to. The file system itself is asked, so that nothing need be remembered.
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

// get returns what a project has. A project that the file system does not know has nothing.
func (p *projects) get(id uint32) (dqblk, error) {
	var value dqblk
	err := p.quotactl(qGetQuota, id, unsafe.Pointer(&value))
	if errors.Is(err, unix.ENOENT) {
		return dqblk{}, nil
	}
	if err != nil {
		return dqblk{}, fmt.Errorf("query project %d of %s: quotactl_fd: %w", id, p.root.Name(), err)
	}
	return value, nil
}

// What follows is from include/uapi/linux/quota.h, dqblk_xfs.h and fs.h: golang.org/x/sys has none of it, and the libraries
// for project quotas need cgo.
const (
	qGetQuota            = 0x800007
	qSetQuota            = 0x800008
	qXGetQStat           = 'X'<<8 + 5
	quotaOfProject       = 2
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
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, dir.Fd(), command<<8|quotaOfProject, uintptr(id), uintptr(value), 0, 0)
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
