package upper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// Kind is how the uppers of a volume are kept in the data root. A volume stays with the kind that its first upper was
// made as.
type Kind string

// The kinds of uppers in a data root, beneath the base directory of each:
//
//	directory       upper/, work/              no limit
//	project-quota   data/{upper/, work/}       data has a project of ext4 or xfs, with the limit
//	btrfs-qgroup    data/{upper/, work/}       data is a subvolume, whose qgroup has the limit
//	disk-image      disk.img                   ext4 of the size of the limit; in it upper/ and work/
//	memory          nothing                    a tmpfs of the size of the limit; in it upper/ and work/
//
// What is mounted for the last two is in a directory of its own (Config.Mounts), and not in the data root: a mount there
// would cost every publish that takes a layer from it.
const (
	Directory    Kind = "directory"
	ProjectQuota Kind = "project-quota"
	BtrfsQgroup  Kind = "btrfs-qgroup"
	DiskImage    Kind = "disk-image"
	Memory       Kind = "memory"
)

const (
	dataName  = "data"
	imageName = "disk.img"
)

// Place is where one upper is kept in the data root. Its methods are called by one at a time, may be called again after
// a crash between any two of their steps, and then go on.
type Place interface {
	// Prepare makes the upper where it is missing, with its limit and with a root as asked, and opens it.
	Prepare(ctx context.Context, root Root) (Dirs, error)
	// ClearWork empties the work directory of an upper on which no overlay is mounted.
	ClearWork() error
	// Release takes away what is only there while the upper is in use. What was written to the disk stays.
	Release() error
	// Discard releases the upper, and has discard take away what is in the data root.
	Discard(discard func(path string) error) error
	// Grow makes the limit of an upper larger, also while it is in use.
	Grow(ctx context.Context, limit Limit) error
	// Usage is how full it is: the upper alone.
	Usage(ctx context.Context) (Usage, error)
	// Taken is how many bytes of the data root's disk it takes.
	Taken(ctx context.Context) (int64, error)
	// Exists reports whether the upper has been made.
	Exists() (bool, error)
	// Check tells what is wrong with an upper that should be there: of the kind NotFound where it is lost, FailedPrecondition
	// where it cannot be written to. What is only there while the upper is in use is looked at where it is.
	Check() error
	// Free is what there is and what is left, of bytes and of inodes: of the upper where it has a limit, else of its file
	// system. It takes the same time however many files there are.
	Free(ctx context.Context) (Usage, error)
	// Paths are where the upper and work directories are, while the upper is in use.
	Paths() (upper, work string)
}

// Limit bounds what an upper may take. Zero is no limit.
type Limit struct{ Bytes, Inodes int64 }

// inodeBytes is for how many bytes of a limit there is one inode.
const inodeBytes = 4 << 10

// minInodes are what the smallest upper may have.
const minInodes = 1024

// LimitOf is the limit of an upper of that many bytes: inodes are limited with them, so that no volume takes those of
// others by empty files.
func LimitOf(bytes int64) Limit {
	if bytes == 0 {
		return Limit{}
	}
	return Limit{Bytes: bytes, Inodes: max(bytes/inodeBytes, minInodes)}
}

// Usage is how much of its limit an upper takes.
type Usage struct{ Bytes, Inodes Amount }

// Amount is a quantity of bytes or inodes.
type Amount struct{ Total, Used, Available int64 }

func amount(total, used int64) Amount {
	return Amount{Total: total, Used: used, Available: max(total-used, 0)}
}

// Want is what a volume asks of its uppers.
type Want struct {
	// Bytes is the size, 0 for none.
	Bytes int64
	// Kind is the kind that the volume insists on, "" for the best. Unlimited: a size need not be kept to.
	Kind      Kind
	Unlimited bool
	// Kept: the upper outlives its pods.
	Kept bool
}

// Config is what is needed to keep uppers.
type Config struct {
	// Root is the data root, open, on the mount on which uppers are used.
	Root *os.File
	// Mounts is a directory for the file systems of disk images and memory uppers, made where it is missing. It must not
	// lie in the data root.
	Mounts string
	// Commands run the programs that make, check and grow file systems.
	Commands commands
}

// Keeper keeps the uppers of a data root in the ways that its file system can.
type Keeper struct {
	config Config
	// lacking says of each kind with a limit why there is none of it here. It is nil where there is.
	lacking map[Kind]error
	quota   *projects
}

// NewKeeper finds out by doing how uppers can be limited in the data root.
func NewKeeper(config Config) *Keeper {
	k := &Keeper{config: config, quota: newProjects(config.Root)}
	k.lacking = map[Kind]error{
		ProjectQuota: k.quota.probe(),
		BtrfsQgroup:  k.probeQgroups(),
		DiskImage:    probeDiskImages(config.Commands),
	}
	return k
}

// limiting are the kinds that keep to a limit on the disk, the best first.
var limiting = []Kind{ProjectQuota, BtrfsQgroup, DiskImage}

// Limits says which kinds of limits there are here, for the log.
func (k *Keeper) Limits() string {
	var names []string
	for _, kind := range limiting {
		if k.lacking[kind] == nil {
			names = append(names, string(kind))
		}
	}
	return strings.Join(names, ",")
}

// Choose chooses the kind for a volume's uppers. Where a size cannot be kept to, the error is of the kind
// FailedPrecondition and says why of each kind, and what to do.
func (k *Keeper) Choose(want Want) (Kind, error) {
	switch {
	case want.Kind == Memory:
		return Memory, nil
	case want.Kind != "":
		if err := k.lacking[want.Kind]; err != nil {
			return "", fmt.Errorf("%w: %s is asked for, and the data root %s has none: %w", errdefs.ErrFailedPrecondition, want.Kind, k.config.Root.Name(), err)
		}
		return want.Kind, nil
	case k.lacking[ProjectQuota] == nil:
		// It costs nothing, and counts what is used, also where nothing is limited.
		return ProjectQuota, nil
	case want.Bytes == 0 || want.Unlimited:
		return Directory, nil
	}
	var reasons []error
	for _, kind := range limiting {
		err := k.lacking[kind]
		if err == nil {
			return kind, nil
		}
		reasons = append(reasons, fmt.Errorf("%s: %w", kind, err))
	}
	return "", fmt.Errorf("%w: a size of %d bytes cannot be kept to in the data root %s (%w): make one of these possible, or say limit: none", errdefs.ErrFailedPrecondition, want.Bytes, k.config.Root.Name(), errors.Join(reasons...))
}

// At is the place of the upper of that kind whose base is a path beneath the data root. ephemeral uppers need not
// outlive a crash of the node.
func (k *Keeper) At(kind Kind, base string, limit Limit, ephemeral bool) Place {
	switch kind {
	case ProjectQuota:
		return quota{NewDir(k.config.Root, filepath.Join(base, dataName)), k.quota, limit}
	case BtrfsQgroup:
		return qgroup{NewDir(k.config.Root, filepath.Join(base, dataName)), k.config.Commands, limit}
	case DiskImage:
		return diskImage{innerMount{k.mountPoint(base)}, k.config.Commands, filepath.Join(k.config.Root.Name(), base), limit, ephemeral}
	case Memory:
		return memory{innerMount{k.mountPoint(base)}, limit}
	}
	return NewDir(k.config.Root, base)
}

// Holds reports whether there is an upper in a base directory, of whatever kind, and says so too where that cannot be
// told.
func Holds(base string) bool {
	for _, name := range []string{upperName, dataName, imageName} {
		if _, err := os.Lstat(filepath.Join(base, name)); !errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	return false
}
