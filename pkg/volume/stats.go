package volume

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Amount is a quantity of bytes or inodes.
type Amount struct{ Total, Used, Available int64 }

// Stats is how full the file system is that holds a volume's upper: overlayfs shows that one's numbers. Of a volume
// without an upper it is the topmost layer's.
type Stats struct{ Bytes, Inodes Amount }

// Stats measures the volume that is published at path. It is of the kind NotFound where the volume is not there.
func (m *Manager) Stats(ctx context.Context, id, path string) (Stats, error) {
	r, err := m.states.load(id)
	if err != nil {
		return Stats{}, err
	}
	if r == nil || r.publication(path) == nil {
		return Stats{}, fmt.Errorf("%w: volume %s is not published at %s", errdefs.ErrNotFound, id, path)
	}
	live, err := m.isLive(r.publication(path))
	if err != nil {
		return Stats{}, err
	}
	if !live {
		return Stats{}, fmt.Errorf("%w: volume %s is not mounted at %s", errdefs.ErrNotFound, id, path)
	}
	return statFS(path)
}

func statFS(path string) (Stats, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return Stats{}, fmt.Errorf("statfs %s: %w", path, err)
	}
	block := int64(stat.Bsize)
	return Stats{
		Bytes: Amount{
			Total:     int64(stat.Blocks) * block,
			Used:      int64(stat.Blocks-stat.Bfree) * block,
			Available: int64(stat.Bavail) * block,
		},
		Inodes: Amount{Total: int64(stat.Files), Used: int64(stat.Files - stat.Ffree), Available: int64(stat.Ffree)},
	}, nil
}

// Capacity is how many bytes are free for uppers in the data root.
func (m *Manager) Capacity() (int64, error) {
	stats, err := statFS(m.root.Path())
	return stats.Bytes.Available, err
}
