package merged

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

const (
	// maxLookups is the maximum number of lookups in the layers of one image, which take some seconds: one of each directory that one
	// layer may have without an entry, in 8 layers. Other images wait for them.
	maxLookups = 1 << 19
	// maxOpen is the maximum number of directories that are open at the same time.
	maxOpen = 1 << 14
)

// WriteAttributes writes a tar of directories to to. Unpacked above the layers of an image, it gives the attributes that lower layers have
// to directories that upper layers have without an entry. layers are the directories of the layers, the topmost first. names are the
// paths of the implied directories of the layers (unpack.Result), in any order. WriteAttributes returns the number of
// entries in the tar. If it is 0, no directory needs one.
//
// A directory gets the attributes of the topmost layer that has an entry for it. A layer in which something else has its name ends the
// search, and so does an opaque directory for what is in it: the directory below is another one. A directory that is opaque and has no
// entry itself hides only what the directory below contains.
func WriteAttributes(ctx context.Context, to io.Writer, layers []*os.File, names []string) (int, error) {
	w := &attributeWriter{out: tar.NewWriter(to)}
	defer func() { w.leave(0) }()
	if err := w.enterRoot(layers); err != nil {
		return 0, err
	}
	names = slices.Clone(names)
	// With the slash before all other characters, what is in a directory follows it.
	slices.SortFunc(names, func(a, b string) int { return comparePaths(a, b) })
	for _, name := range slices.Compact(names) {
		if err := ctx.Err(); err != nil {
			return 0, context.Cause(ctx)
		}
		if err := w.add(strings.Split(name, "/")); err != nil {
			return 0, fmt.Errorf("find the attributes of directory %.256q: %w", name, err)
		}
	}
	return w.entries, w.out.Close()
}

func comparePaths(a, b string) int {
	for i := range min(len(a), len(b)) {
		switch {
		case a[i] == b[i]:
		case a[i] == '/':
			return -1
		case b[i] == '/':
			return 1
		default:
			return cmp.Compare(a[i], b[i])
		}
	}
	return cmp.Compare(len(a), len(b))
}

// attributeWriter writes a tar of directories.
type attributeWriter struct {
	out     *tar.Writer
	entries int
	// path has the directories from the root to the one that was looked up last. The first written of them are in the tar.
	path    []mergedDir
	written int
	lookups int
	open    int
}

// mergedDir is a directory of the image.
type mergedDir struct {
	name string
	// dirs are the directories of the layers that it is merged of, the topmost first. They are never empty.
	dirs []*os.File
	// source has its attributes: it is the topmost with an entry, or nil if there is none.
	source *os.File
	// isHidden reports whether the directory on top hides the attributes of source.
	isHidden bool
	// opened are the directories that leaving this one closes.
	opened []*os.File
}

// enterRoot begins the path. The root of most layers has no entry: times that differ alone are not worth a layer.
func (w *attributeWriter) enterRoot(layers []*os.File) error {
	root := mergedDir{dirs: layers}
	for i, dir := range layers {
		isImplied, err := unpack.IsImplied(dir)
		if err != nil {
			return err
		}
		if !isImplied {
			root.source, root.isHidden = dir, i > 0
			break
		}
	}
	w.path = []mergedDir{root}
	if !root.isHidden {
		return nil
	}
	made, err := w.header(layers[0])
	if err != nil {
		return err
	}
	meant, err := w.header(root.source)
	if err != nil {
		return err
	}
	// What directories inherit on this file system, both have.
	isSame := made.Mode == meant.Mode && made.Uid == meant.Uid && made.Gid == meant.Gid && maps.Equal(made.PAXRecords, meant.PAXRecords)
	if isSame {
		return nil
	}
	return w.write()
}

// add adds a directory to the tar if upper layers hide its attributes. Those above it come first: the tar hides their attributes too.
func (w *attributeWriter) add(components []string) error {
	known := 0
	for known < len(components) && known+1 < len(w.path) && w.path[known+1].name == components[known] {
		known++
	}
	w.leave(known + 1)
	for _, name := range components[known:] {
		parent := w.path[len(w.path)-1]
		if len(parent.dirs) == 1 {
			// Nothing is below what is in it.
			return nil
		}
		dir, err := w.lookUp(parent.dirs, name)
		if err != nil {
			closeAll(dir.opened)
			return err
		}
		if len(dir.dirs) == 0 {
			closeAll(dir.opened)
			return nil
		}
		w.path = append(w.path, dir)
		if w.open += len(dir.opened); w.open > maxOpen {
			return fmt.Errorf("%w: it is too deep in too many layers; rebuild the image with fewer layers", errdefs.ErrInvalidArgument)
		}
	}
	if !w.path[len(w.path)-1].isHidden {
		return nil
	}
	return w.write()
}

// leave shortens the path.
func (w *attributeWriter) leave(length int) {
	for _, dir := range w.path[min(length, len(w.path)):] {
		closeAll(dir.opened)
		w.open -= len(dir.opened)
	}
	w.path = w.path[:min(length, len(w.path))]
	w.written = min(w.written, len(w.path))
}

// lookUp looks up a name in a merged directory. The result has no dirs if there is no directory of that name.
func (w *attributeWriter) lookUp(layers []*os.File, name string) (found mergedDir, _ error) {
	found.name = name
	isOpaque := false
	for _, layer := range layers {
		if w.lookups++; w.lookups > maxLookups {
			return found, fmt.Errorf("%w: the layers of the image have too many directories without entries; "+
				"rebuild the image so that its layers have an entry for each directory", errdefs.ErrResourceExhausted)
		}
		// Reading attributes of an O_PATH handle takes twice the time.
		dir, err := linux.Open(layer, name, os.O_RDONLY|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
			break
		}
		if err != nil {
			return found, err
		}
		found.opened = append(found.opened, dir)
		if !isOpaque {
			found.dirs = append(found.dirs, dir)
		}
		isImplied, err := unpack.IsImplied(dir)
		if err != nil {
			return found, err
		}
		if !isImplied && found.source == nil {
			found.source, found.isHidden = dir, len(found.opened) > 1
		}
		hides, err := unpack.IsOpaque(dir)
		if err != nil {
			return found, err
		}
		if isOpaque = isOpaque || hides; isOpaque && found.source != nil {
			break
		}
	}
	return found, nil
}

// write adds the directories of the path to the tar that are not there yet. One that no layer has an entry for has no attributes but those
// that it gets without an entry here too, and its time would make each tar another one.
func (w *attributeWriter) write() error {
	for ; w.written < len(w.path); w.written++ {
		if w.path[w.written].source == nil {
			continue
		}
		header, err := w.header(w.path[w.written].source)
		if err != nil {
			return err
		}
		header.Name = "./"
		for _, dir := range w.path[1 : w.written+1] {
			header.Name += dir.name + "/"
		}
		if err := w.out.WriteHeader(header); err != nil {
			return err
		}
		w.entries++
	}
	return nil
}

// header returns the attributes of a directory.
func (w *attributeWriter) header(dir *os.File) (*tar.Header, error) {
	stat, err := linux.StatFile(dir)
	if err != nil {
		return nil, err
	}
	header := &tar.Header{
		Typeflag: tar.TypeDir, Mode: int64(stat.Perm()), Uid: int(stat.Uid), Gid: int(stat.Gid),
		ModTime: time.Unix(stat.Mtim.Unix()), PAXRecords: map[string]string{}, Format: tar.FormatPAX,
	}
	names, err := linux.ListXattr(dir)
	if err != nil && !errors.Is(err, syscall.ENOTSUP) {
		return nil, err
	}
	for _, name := range names {
		if unpack.IsIgnoredXattr(name) {
			continue
		}
		value, err := linux.GetXattr(dir, name)
		if err != nil {
			return nil, err
		}
		header.PAXRecords[unpack.XattrRecord+name] = string(value)
	}
	return header, nil
}
