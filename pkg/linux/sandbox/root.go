package sandbox

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// rootSize is the maximum size of a root, as tmpfs takes it.
const rootSize = "32m"

// maxFiles is the maximum number of files of a root: the program, its interpreter and its libraries.
const maxFiles = 32

// libraryDirs are where libraries are, as the dynamic linkers of Debian and others have it.
var libraryDirs = []string{"/lib", "/usr/lib", "/lib/*-linux-gnu", "/usr/lib/*-linux-gnu", "/lib64", "/usr/lib64"}

// Root is a file system with copies of one program, its dynamic linker and its libraries. It is mounted nowhere.
type Root struct{ dir *os.File }

// NewRoot returns a root with the program at a path of this system. In it the program is /program, its libraries are beside it, and the
// dynamic linker is where the program says.
func NewRoot(program string) (*Root, error) {
	files, err := filesOf(program)
	if err != nil {
		return nil, err
	}
	tmpfs, err := linux.Fsopen("tmpfs")
	if err != nil {
		return nil, err
	}
	defer tmpfs.Close()
	for key, value := range map[string]string{"size": rootSize, "mode": "0555", "source": "overlay-csi"} {
		if err := tmpfs.SetString(key, value); err != nil {
			return nil, err
		}
	}
	if err := tmpfs.Create(); err != nil {
		return nil, err
	}
	dir, err := tmpfs.Mount(linux.MountAttrNoSUID | linux.MountAttrNoDev)
	if err != nil {
		return nil, err
	}
	root := &Root{dir}
	for name, source := range files {
		if err := root.add(name, source); err != nil {
			return nil, errors.Join(fmt.Errorf("copy %s: %w", source, err), root.Close())
		}
	}
	if err := linux.MountSetattr(dir, linux.MountChange{Set: linux.MountAttrReadOnly}); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return root, nil
}

// Close frees the root. Programs that run in it go on.
func (r *Root) Close() error { return r.dir.Close() }

// add copies a file of this system, whatever this process's umask is: another user runs it.
func (r *Root) add(name, source string) error {
	from, err := os.Open(source)
	if err != nil {
		return err
	}
	defer from.Close()
	for _, parent := range parents(name) {
		if err := linux.Mkdirat(r.dir, parent, 0o555); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err := linux.Fchmodat(r.dir, parent, 0o555); err != nil {
			return err
		}
	}
	to, err := linux.OpenFile(r.dir, name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o555, linux.ResolveBeneath|linux.ResolveNoSymlinks)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Chmod(0o555), to.Close())
}

// parents returns the directories above a relative path, the topmost first.
func parents(name string) []string {
	var above []string
	for dir := filepath.Dir(name); dir != "."; dir = filepath.Dir(dir) {
		above = append(above, dir)
	}
	slices.Reverse(above)
	return above
}

// programName is the name of the program in its root.
const programName = "program"

// filesOf returns the files of a root for a program: paths of this system by paths in the root.
func filesOf(program string) (map[string]string, error) {
	files := map[string]string{programName: program}
	interpreter, needed, err := linked(program)
	if err != nil {
		return nil, err
	}
	if interpreter != "" {
		files[filepath.Clean(interpreter)[1:]] = interpreter
	}
	for len(needed) > 0 {
		name := needed[0]
		needed = needed[1:]
		if _, ok := files[name]; ok || name == filepath.Base(interpreter) {
			continue
		}
		if len(files) == maxFiles || name != filepath.Base(name) {
			return nil, fmt.Errorf("%s: cannot have library %q in a root of its own", program, name)
		}
		if files[name], err = findLibrary(name); err != nil {
			return nil, fmt.Errorf("%s: %w", program, err)
		}
		_, more, err := linked(files[name])
		if err != nil {
			return nil, err
		}
		needed = append(needed, more...)
	}
	return files, nil
}

// linked returns the dynamic linker of a program, "" for a static one, and the names of its libraries.
func linked(path string) (interpreter string, libraries []string, _ error) {
	file, err := elf.Open(path)
	if err != nil {
		return "", nil, fmt.Errorf("read program %s: %w", path, err)
	}
	defer file.Close()
	if libraries, err = file.ImportedLibraries(); err != nil {
		return "", nil, fmt.Errorf("read the libraries of program %s: %w", path, err)
	}
	for _, segment := range file.Progs {
		if segment.Type != elf.PT_INTERP {
			continue
		}
		name := make([]byte, min(segment.Filesz, 4096))
		if _, err := segment.ReadAt(name, 0); err != nil {
			return "", nil, fmt.Errorf("read the interpreter of program %s: %w", path, err)
		}
		interpreter = string(name[:max(len(name)-1, 0)])
		if !filepath.IsAbs(interpreter) {
			return "", nil, fmt.Errorf("program %s has interpreter %q, which is no absolute path", path, interpreter)
		}
	}
	return interpreter, libraries, nil
}

func findLibrary(name string) (string, error) {
	for _, pattern := range libraryDirs {
		dirs, err := filepath.Glob(pattern)
		if err != nil {
			return "", err
		}
		for _, dir := range dirs {
			path := filepath.Join(dir, name)
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("library %s is in none of %q", name, libraryDirs)
}
