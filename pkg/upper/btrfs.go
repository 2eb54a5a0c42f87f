package upper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// btrfsQgroup is an upper in a subvolume of btrfs, whose qgroup has the limit. It limits bytes only: btrfs has no limit of
// inodes (btrfs-qgroup(8)).
type btrfsQgroup struct {
	directory
	commands commands
	limit    Limit
}

const btrfsProgram = "btrfs"

// probeBtrfs returns nil if the data root is on btrfs with quotas. The driver does not switch them on, because of what they
// cost: the operator does.
func probeBtrfs(root *os.File, commands commands) error {
	magic, err := linux.FileSystemMagic(root)
	if err != nil {
		return err
	}
	if magic != linux.BtrfsMagic {
		return errors.New("the file system is not btrfs")
	}
	if _, err := runBtrfs(context.Background(), commands, "qgroup", "show", root.Name()); err != nil {
		return fmt.Errorf("btrfs has no quotas here (btrfs quota enable): %w", err)
	}
	return nil
}

func runBtrfs(ctx context.Context, commands commands, args ...string) (string, error) {
	output, err := commands.CommandContext(ctx, btrfsProgram, args...).CombinedOutput()
	text := strings.TrimSpace(string(output))
	if err != nil {
		return "", fmt.Errorf("btrfs %s: %w: %s", strings.Join(args, " "), err, text)
	}
	return text, nil
}

// Prepare makes the subvolume and sets its limit before there is an upper in it.
func (q btrfsQgroup) Prepare(ctx context.Context, root RootAttr) (Dirs, error) {
	if _, err := os.Lstat(q.path()); errors.Is(err, fs.ErrNotExist) {
		if _, err := runBtrfs(ctx, q.commands, "subvolume", "create", q.path()); err != nil {
			return Dirs{}, fmt.Errorf("make a subvolume: %w", err)
		}
	}
	if err := q.Grow(ctx, q.limit); err != nil {
		return Dirs{}, err
	}
	return q.directory.Prepare(ctx, root)
}

func (q btrfsQgroup) Grow(ctx context.Context, limit Limit) error {
	if _, err := os.Lstat(q.path()); err != nil {
		return notFound(err)
	}
	size := "none"
	if limit.Bytes > 0 {
		size = strconv.FormatInt(limit.Bytes, 10)
	}
	if _, err := runBtrfs(ctx, q.commands, "qgroup", "limit", size, q.path()); err != nil {
		return fmt.Errorf("limit a subvolume: %w", err)
	}
	return nil
}

// Discard discards the subvolume.
func (q btrfsQgroup) Discard(context.Context) error { return q.discard(q.path()) }

// Usage returns what the qgroup has counted. statfs(2) shows the whole file system, without the limit.
func (q btrfsQgroup) Usage(ctx context.Context) (Usage, error) {
	used, limit, err := q.counted(ctx)
	if err != nil {
		return Usage{}, err
	}
	usage, err := fileSystemUsage(q.path())
	if err != nil {
		return Usage{}, err
	}
	usage.Bytes = within(usage.Bytes, limit, used)
	return usage, nil
}

func (q btrfsQgroup) Free(ctx context.Context) (Usage, error) { return q.Usage(ctx) }

func (q btrfsQgroup) DiskUsage(ctx context.Context) (int64, error) {
	used, _, err := q.counted(ctx)
	return used, err
}

func (q btrfsQgroup) counted(ctx context.Context) (used, limit int64, err error) {
	if _, err := os.Lstat(q.path()); err != nil {
		return 0, 0, notFound(err)
	}
	output, err := runBtrfs(ctx, q.commands, "qgroup", "show", "--raw", "-r", "-f", q.path())
	if err != nil {
		return 0, 0, fmt.Errorf("query a qgroup: %w", err)
	}
	return parseQgroup(output)
}

// parseQgroup reads the referenced bytes of a qgroup and its limit (0 for none) from the output of btrfs qgroup show --raw -r.
func parseQgroup(output string) (used, limit int64, err error) {
	for line := range strings.Lines(output) {
		fields := strings.Fields(line)
		if len(fields) < 4 || !strings.HasPrefix(fields[0], "0/") {
			continue
		}
		if used, err = parseBytes(fields[1]); err != nil {
			return 0, 0, err
		}
		if fields[3] != "none" {
			limit, err = parseBytes(fields[3])
		}
		return used, limit, err
	}
	return 0, 0, fmt.Errorf("btrfs qgroup show: no qgroup in %q", output)
}

func parseBytes(text string) (int64, error) {
	// There is no negative number of bytes.
	bytes, err := strconv.ParseUint(text, 10, 63)
	if err != nil {
		return 0, fmt.Errorf("btrfs qgroup show: %w", err)
	}
	return int64(bytes), nil
}
