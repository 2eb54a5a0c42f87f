package chaos

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// tree is the content of files by their paths.
type tree map[string]string

// merge returns what layers show, the lowest first.
func merge(layers ...tree) tree {
	merged := tree{}
	for _, layer := range layers {
		maps.Copy(merged, layer)
	}
	return merged
}

// upper is the model of an upper: what its views must show.
type upper struct {
	files tree
	// uncertain are files whose last change failed: they may have any content, or none.
	uncertain map[string]bool
}

func newUpper(layers tree) *upper {
	return &upper{files: merge(layers), uncertain: map[string]bool{}}
}

// clone returns an upper that begins as this one is.
func (u *upper) clone() *upper {
	return &upper{files: maps.Clone(u.files), uncertain: maps.Clone(u.uncertain)}
}

// claim is a provisioned volume.
type claim struct {
	drivertest.Volume
	origin
	// upper is nil where each pod has its own.
	upper *upper
	// made is set once there is something that the driver must miss where it is lost: no snapshot has taken it over.
	made bool
}

// origin is what a clone has of the claim that it comes from.
type origin struct {
	// parameters are those of its StorageClass.
	parameters map[string]string
	layers     tree
	secrets    map[string]string
	size       int64
}

// view is a volume of a pod.
type view struct {
	drivertest.Volume
	claim *claim
	// layers are what the layers show.
	layers tree
	upper  *upper
	// published is false where the last publish failed: the target may be mounted, or not.
	published bool
	// cache is the name of the cache that is its only layer, and commit that of the cache that its upper becomes, both "" for none.
	cache, commit string
	// bases are what the cache may have had when the view was first published, and boot is that of the node at that time.
	bases []*upper
	boot  int
}

// limit returns the size in bytes that is enforced, or 0.
func (v *view) limit() int64 {
	switch {
	case v.Attributes["sizeEnforcement"] == "none":
		return 0
	case v.claim != nil:
		return v.claim.size
	case v.Attributes["sizeLimit"] == "8Mi":
		return 8 << 20
	case v.Attributes["sizeLimit"] == "16Mi":
		return 16 << 20
	}
	return 0
}

func (v *view) isReadOnly() bool { return v.Attributes["upper"] == "none" }

// pod is a pod with its volumes.
type pod struct {
	*drivertest.Pod
	views []*view
	// hasPlanted is set where the pod has put something in the way of an upper in its volume.
	hasPlanted bool
}

// check compares what a directory shows with the model.
func (u *upper) check(dir string) error {
	shown := tree{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		shown[name] = string(content)
		return err
	})
	if err != nil {
		return err
	}
	var wrong []error
	for _, name := range slices.Sorted(maps.Keys(u.files)) {
		content, ok := shown[name]
		if !u.uncertain[name] && (!ok || content != u.files[name]) {
			wrong = append(wrong, fmt.Errorf("%s has %s instead of %s", name, brief(content, ok), brief(u.files[name], true)))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(shown)) {
		if _, ok := u.files[name]; !ok && !u.uncertain[name] {
			wrong = append(wrong, fmt.Errorf("%s is there, with %s", name, brief(shown[name], true)))
		}
	}
	return errors.Join(wrong...)
}

func brief(content string, exists bool) string {
	if !exists {
		return "no file"
	}
	return fmt.Sprintf("%d bytes %.20q", len(content), content)
}

// write writes a file in a view and in the model. What it returns without an error is on the disk.
func (u *upper) write(dir, name, content string, flag int) error {
	u.uncertain[name] = true
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|flag, 0o644)
	if err != nil {
		return err
	}
	_, err = file.WriteString(content)
	if err := errors.Join(err, file.Sync(), file.Close(), syncTo(dir, name)); err != nil {
		return err
	}
	if flag&os.O_APPEND != 0 {
		content = u.files[name] + content
	}
	u.files[name] = content
	delete(u.uncertain, name)
	return nil
}

// remove removes a file in a view and in the model.
func (u *upper) remove(dir, name string) error {
	u.uncertain[name] = true
	if err := errors.Join(os.Remove(filepath.Join(dir, name)), syncTo(dir, name)); err != nil {
		return err
	}
	delete(u.files, name)
	delete(u.uncertain, name)
	return nil
}

// rename renames a file in a view and in the model.
func (u *upper) rename(dir, from, to string) error {
	u.uncertain[from], u.uncertain[to] = true, true
	err := os.MkdirAll(filepath.Dir(filepath.Join(dir, to)), 0o755)
	if err == nil {
		err = os.Rename(filepath.Join(dir, from), filepath.Join(dir, to))
	}
	if err := errors.Join(err, syncTo(dir, from), syncTo(dir, to)); err != nil {
		return err
	}
	u.files[to] = u.files[from]
	delete(u.files, from)
	delete(u.uncertain, from)
	delete(u.uncertain, to)
	return nil
}

// certain returns the files whose content is known.
func (u *upper) certain() []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(u.files)), func(name string) bool { return u.uncertain[name] })
}

// syncTo writes the directories from dir to that of a file to the disk.
func syncTo(dir, name string) error {
	var failed error
	for part := filepath.Dir(name); ; part = filepath.Dir(part) {
		handle, err := os.Open(filepath.Join(dir, part))
		if err != nil {
			return errors.Join(failed, err)
		}
		failed = errors.Join(failed, handle.Sync(), handle.Close())
		if part == "." || !strings.Contains(name, "/") {
			return failed
		}
	}
}
