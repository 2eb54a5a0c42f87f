package dataroot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

const (
	// ballastFiles is how many files the ballast has. Most of what is given up comes back: this is for what neighbours get of it. One that
	// takes what becomes free at any moment gets up to six files of each publish on xfs and btrfs, and hardly any on ext4: by that
	// it is enough for the 110 pods that kubelet runs.
	ballastFiles = 768
	// ballastFileBytes is the size of each of them, which is more than most records have. xfs makes a directory only where about 60
	// blocks are free: these are four files.
	ballastFileBytes = 64 << 10
	// ballastShare is the share of the disk, and of its inodes, that the ballast takes at most.
	ballastShare = 64
	// ballastTries is how often something is tried again. Each time twice as many files are given up, firstGiven at first.
	ballastTries = 5
	firstGiven   = 2
	// spareBytes is what a file has at least that was a record: a block.
	spareBytes = 4 << 10
	// With less than this, a file system may refuse to write something.
	fullBytes  = 4 << 20
	fullInodes = 64
)

// Keys of log messages.
const (
	keyBallast = "ballast"
	keyFiles   = "files"
)

// Ballast is disk space of the data root that is set aside while there is room, and used when something must be written on a disk that
// others have filled. It is a directory of small files with an inode and some blocks each: others race for what is given up, and
// should not get all of it. What they leave is set aside again at once. A nil Ballast has nothing to give.
//
// On the disk, every file is part of the ballast, whatever it has. Fill gives it the blocks that it lacks, after a crash too. Nothing is
// synced.
type Ballast struct {
	path string

	mu sync.Mutex
	// dir is nil before the directory has been made.
	dir *os.File
	// whole are the names of files that have all of their blocks, spares of those that have what a record takes, and partial of others.
	whole, spares, partial []string
	next                   int
	// wanted is how many files there are on a disk with room, 0 before that is known.
	wanted int
	// waiting counts those who gave up files, and try again with what these had. Fill does not take it from them.
	waiting int
}

// openBallast opens the ballast with the files that an earlier process made. On a disk without room it may not be there yet.
func openBallast(path string) (*Ballast, error) {
	b := &Ballast{path: path}
	if err := b.open(); err != nil && !linux.IsNotWritable(err) {
		return nil, fmt.Errorf("open the ballast: %w", err)
	}
	return b, nil
}

func (b *Ballast) open() error {
	if err := os.MkdirAll(b.path, 0o700); err != nil {
		return err
	}
	dir, err := linux.OpenDir(b.path)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(b.path)
	if err != nil {
		dir.Close()
		return err
	}
	b.dir = dir
	for _, entry := range entries {
		b.add(entry.Name())
		if number, err := strconv.Atoi(entry.Name()); err == nil {
			b.next = max(b.next, number+1)
		}
	}
	return nil
}

// add adds a file, if it is there.
func (b *Ballast) add(name string) {
	stat, err := linux.Fstatat(b.dir, name)
	switch {
	case err != nil:
	case stat.DiskBytes() >= ballastFileBytes:
		b.whole = append(b.whole, name)
	case stat.DiskBytes() > 0:
		b.spares = append(b.spares, name)
	default:
		b.partial = append(b.partial, name)
	}
}

// Close closes the directory. The files stay.
func (b *Ballast) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.dir == nil {
		return nil
	}
	return b.dir.Close()
}

// Fill makes the files that are missing, as far as there is room. It is no error if there is none.
func (b *Ballast) Fill() error {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	usage, err := linux.FileSystemUsageAt(filepath.Dir(b.path))
	if err == nil {
		b.wanted = wantedFiles(usage)
		err = b.fill()
	}
	if err != nil && !isFull(err) && !errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("fill the ballast: %w", err)
	}
	return nil
}

func wantedFiles(usage linux.Usage) int {
	wanted := min(ballastFiles, usage.Bytes.Total/ballastShare/ballastFileBytes)
	if usage.Inodes.Total > 0 {
		wanted = min(wanted, usage.Inodes.Total/ballastShare)
	}
	return int(wanted)
}

// fill makes files whole until there are enough. The caller holds b.mu.
func (b *Ballast) fill() error {
	if b.dir == nil {
		if err := b.open(); err != nil {
			return err
		}
	}
	for b.waiting == 0 && len(b.whole) < b.wanted {
		name, ok := pop(&b.partial, &b.spares)
		if !ok {
			name = strconv.Itoa(b.next)
			b.next++
		}
		before := len(b.whole)
		err := b.makeWhole(name)
		b.add(name)
		if err != nil || len(b.whole) == before {
			// A file system that compresses gives no blocks for zeroes.
			return err
		}
	}
	return nil
}

// makeWhole gives a file its blocks, and makes it if it is missing.
func (b *Ballast) makeWhole(name string) error {
	file, err := linux.OpenFile(b.dir, name, os.O_WRONLY|os.O_CREATE|linux.O_NOFOLLOW, 0o600, 0)
	if err != nil {
		return err
	}
	err = linux.Reserve(file, ballastFileBytes)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		_, err = file.Write(make([]byte, ballastFileBytes))
	}
	return errors.Join(err, file.Close())
}

// pop takes the last name from the first list that has one.
func pop(lists ...*[]string) (name string, ok bool) {
	for _, list := range lists {
		if last := len(*list) - 1; last >= 0 {
			name, *list = (*list)[last], (*list)[:last]
			return name, true
		}
	}
	return "", false
}

// Missing returns how many files the ballast lacks, and how many it has on a disk with room.
func (b *Ballast) Missing() (missing, wanted int) {
	if b == nil {
		return 0, 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return max(b.wanted-len(b.whole), 0), b.wanted
}

// With does something in the data root. Where that fails because the disk is full, it gives up a part of the ballast and does it again,
// a bounded number of times. An error for want of something else, of a quota for instance, is no reason to do so.
func (b *Ballast) With(do func() error) error {
	err := do()
	if b == nil || !isFull(err) || !b.lacksRoom() {
		return err
	}
	b.begin()
	defer b.end()
	given := firstGiven
	for range ballastTries {
		if !b.giveUp(given) {
			return err
		}
		if err = do(); !isFull(err) {
			return err
		}
		given *= 2
	}
	return err
}

// ReplaceFile replaces a file of an open directory of the data root as [linux.WriteFileAtomic] does. On a full disk it writes to a file
// of the ballast, and the file that it replaces becomes part of the ballast: nobody else can get the blocks that it needs. Only if that
// does not do does it give up others.
func (b *Ballast) ReplaceFile(dir *os.File, name string, data []byte, sync bool) error {
	err := linux.WriteFileAtomic(dir, name, data, sync)
	if b == nil || !isFull(err) {
		return err
	}
	b.begin()
	defer b.end()
	// A record that is larger than one of the files needs the blocks of others.
	given := max(firstGiven, len(data)/ballastFileBytes)
	for range ballastTries {
		spare, ok := b.take(len(data))
		if !ok {
			// What was given up is free, unless a neighbour was faster.
			return linux.WriteFileAtomic(dir, name, data, sync)
		}
		err = linux.WriteFileAtomicInto(b.dir, spare, dir, name, data)
		b.giveBack(spare)
		if !isFull(err) {
			return err
		}
		// The directory has no room for another name, or the data is larger than the file.
		b.giveUp(given)
		given *= 2
	}
	return err
}

func isFull(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// lacksRoom reports whether the disk is full. Where the file system does not say, it is.
func (b *Ballast) lacksRoom() bool {
	usage, err := linux.FileSystemUsageAt(filepath.Dir(b.path))
	return err != nil || usage.Bytes.Available < fullBytes || (usage.Inodes.Total > 0 && usage.Inodes.Available < fullInodes)
}

// begin is called before files are taken, and end when what needed them is done or has failed.
func (b *Ballast) begin() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting++
	if b.wanted > 0 && len(b.whole) == b.wanted {
		klog.Background().Info("The disk of the data root is full; the ballast is used now", keyBallast, b.path, keyFiles, b.wanted)
	}
}

func (b *Ballast) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting--
	if b.dir == nil {
		return
	}
	// What is left of it, before a neighbour takes that. The disk is full, so that an error is nothing new.
	_ = b.fill()
	if len(b.whole) == 0 {
		klog.Background().Info("The disk of the data root is full, and the ballast is used up; free disk space", keyBallast, b.path)
	}
}

// take takes a file that data of that size can be written to. It returns false if there is none.
func (b *Ballast) take(size int) (name string, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if size <= spareBytes {
		return pop(&b.spares, &b.whole)
	}
	// A spare file may have been a record as large, and one without blocks has an inode.
	return pop(&b.whole, &b.spares, &b.partial)
}

// giveBack adds a file that was taken, if it is still there.
func (b *Ballast) giveBack(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.add(name)
}

// giveUp frees the blocks of some files, and the inode of one of them: a file that has an inode gets blocks back more easily. It
// returns false if there is nothing to free.
func (b *Ballast) giveUp(count int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	name, ok := pop(&b.whole, &b.partial, &b.spares)
	if !ok {
		return false
	}
	if err := linux.Unlinkat(b.dir, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	for range count - 1 {
		name, ok := pop(&b.whole)
		if !ok {
			break
		}
		b.truncate(name)
		b.add(name)
	}
	return true
}

// truncate frees the blocks of a file.
func (b *Ballast) truncate(name string) {
	file, err := linux.OpenFile(b.dir, name, os.O_WRONLY|linux.O_NOFOLLOW, 0, 0)
	if err != nil {
		return
	}
	defer file.Close()
	_ = file.Truncate(0)
}
