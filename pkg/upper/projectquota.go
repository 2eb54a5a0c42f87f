package upper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
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
	if err := linux.Mkdirat(q.root, q.base, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return Dirs{}, fmt.Errorf("make the upper's directory %s: %w", q.path(), err)
	}
	if err := q.Grow(ctx, q.limit); err != nil {
		return Dirs{}, err
	}
	return q.directory.Prepare(ctx, root)
}

func (q projectQuota) Grow(_ context.Context, limit Limit) error {
	dir, err := q.open(os.O_RDONLY)
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
	usage, err := fileSystemUsage(q.path())
	if err != nil {
		return Usage{}, err
	}
	usage.Bytes = within(usage.Bytes, counted.BytesLimit, counted.Bytes)
	usage.Inodes = within(usage.Inodes, counted.InodesLimit, counted.Inodes)
	return usage, nil
}

func (q projectQuota) Free(ctx context.Context) (Usage, error) { return q.Usage(ctx) }

func (q projectQuota) DiskUsage(context.Context) (int64, error) {
	counted, err := q.counted()
	return counted.Bytes, err
}

func (q projectQuota) counted() (linux.ProjectQuota, error) {
	dir, err := q.open(os.O_RDONLY)
	if err != nil {
		return linux.ProjectQuota{}, err
	}
	defer dir.Close()
	project, err := linux.Project(dir)
	if err != nil {
		return linux.ProjectQuota{}, err
	}
	return linux.GetProjectQuota(q.root, project)
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
	counted, enforced, err := linux.ProjectQuotaState(p.root)
	if err != nil {
		return fmt.Errorf("the file system has no project quota (mount it with prjquota): %w", err)
	}
	if !counted || !enforced {
		return errors.New("the project quota of the file system is off (mount it with prjquota)")
	}
	root, err := linux.Open(p.root, ".", os.O_RDONLY|linux.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	project, err := linux.Project(root)
	if err == nil && project != 0 {
		return fmt.Errorf("the data root itself belongs to project %d", project)
	}
	return err
}

// limit gives a directory a project of its own if it has none, and sets the project's limit.
func (p *projects) limit(dir *os.File, limit Limit) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	project, err := linux.Project(dir)
	if err != nil {
		return err
	}
	if project != 0 {
		return linux.SetProjectLimits(p.root, project, limit.Bytes, limit.Inodes)
	}
	if project, err = p.free(); err != nil {
		return err
	}
	if err := linux.SetProjectLimits(p.root, project, limit.Bytes, limit.Inodes); err != nil {
		return err
	}
	return linux.SetProject(dir, project)
}

// free returns a project that no file belongs to. The file system itself is asked, so that nothing need be remembered.
func (p *projects) free() (uint32, error) {
	for range lastProject - firstProject + 1 {
		id := p.next
		if p.next++; p.next > lastProject {
			p.next = firstProject
		}
		counted, err := linux.GetProjectQuota(p.root, id)
		if err != nil {
			return 0, err
		}
		if counted.Inodes == 0 && counted.Bytes == 0 {
			return id, nil
		}
	}
	return 0, fmt.Errorf("%w: all %d projects of %s are in use", errdefs.ErrResourceExhausted, lastProject-firstProject+1, p.root.Name())
}
