package diff

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	// maxNames is how many names of one directory are in memory at most once they are sorted, and maxOuterNames how many bytes of names
	// of all directories above it.
	maxNames      = 32 << 10
	maxOuterNames = 8 << 20
	// keptNames is how many names of a directory stay in memory if those above are more than that, and fewNames if they are twice as many:
	// a path can have two thousand directories.
	keptNames = 1 << 10
	fewNames  = 32
	// maxNameInError is how many bytes of a path are in an error.
	maxNameInError = 256
	// listed is how many names are read of a directory at once.
	listed = 1024
)

// names are some of the names of a directory, sorted. A larger directory is read again for those that follow.
type names struct {
	list []string
	// last is the last name that was taken, and more reports whether others follow the list.
	last string
	more bool
}

// read reads the first names after last that any of the directories has.
func (n *names) read(dirs []*os.File) error {
	n.list, n.more = nil, false
	for _, dir := range dirs {
		if _, err := dir.Seek(0, io.SeekStart); err != nil {
			return err
		}
		for {
			batch, err := dir.Readdirnames(listed)
			for _, name := range batch {
				if name > n.last && (!n.more || name <= n.list[maxNames-1]) {
					n.list = append(n.list, name)
				}
			}
			if len(n.list) >= 2*maxNames {
				n.cut()
			}
			if errors.Is(err, io.EOF) || errors.Is(err, fs.ErrNotExist) {
				break
			}
			if err != nil {
				return err
			}
		}
	}
	n.cut()
	return nil
}

// cut sorts the list, and drops names that are there twice or beyond the limit.
func (n *names) cut() {
	slices.Sort(n.list)
	n.list = slices.Compact(n.list)
	if len(n.list) > maxNames {
		n.list = slices.Clone(n.list[:maxNames])
		n.more = true
	}
}

// forget drops all names but the next ones. The others are read again.
func (n *names) forget(keep int) {
	if len(n.list) > keep {
		n.list = slices.Clone(n.list[:keep])
		n.more = true
	}
}

// size is about what the names take in memory.
func (n *names) size() int {
	size := 0
	for _, name := range n.list {
		size += len(name) + 16
	}
	return size
}

// quote returns the beginning of a path for an error, in quotes.
func quote(path string) string {
	if len(path) > maxNameInError {
		return fmt.Sprintf("%q…", path[:maxNameInError])
	}
	return fmt.Sprintf("%q", path)
}

func pathTooLong(e entry) error {
	return fmt.Errorf("%w: the path of a file named %s has more than %d bytes", errdefs.ErrFailedPrecondition,
		quote(strings.ToValidUTF8(e.name, "\uFFFD")), maxPath)
}
