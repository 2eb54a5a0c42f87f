package upper

import "github.com/overlay-csi/overlay-csi/pkg/linux"

// Limit bounds what an upper may take. Zero is no limit.
type Limit struct{ Bytes, Inodes int64 }

const (
	// inodeBytes is how many bytes of a limit there are for each inode of it.
	inodeBytes = 4 << 10
	// minInodes is the limit of inodes of the smallest upper.
	minInodes = 1024
)

// LimitOf returns the limit of an upper of that many bytes. Inodes are limited as well, so that no volume takes those of
// others with empty files.
func LimitOf(bytes int64) Limit {
	if bytes == 0 {
		return Limit{}
	}
	return Limit{Bytes: bytes, Inodes: max(bytes/inodeBytes, minInodes)}
}

// Usage is how much of its limit an upper takes.
type Usage = linux.Usage

// within returns what a limit (0 for none) leaves of a file system's space.
func within(all linux.Space, limit, used int64) linux.Space {
	if limit == 0 {
		return linux.Space{Total: used + all.Available, Used: used, Available: all.Available}
	}
	return linux.Space{Total: limit, Used: used, Available: min(max(limit-used, 0), all.Available)}
}
