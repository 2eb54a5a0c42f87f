package overlay

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// maxMountData is what mount(2) takes of file-system options: a page less its end mark.
const maxMountData = 4095

// mountWithCommand mounts the overlay with mount(8), for kernels whose overlayfs has no lowerdir+.
//
// mount(2) takes one page of options, in which `:`, `,` and `\` have meanings. Every directory therefore goes in as a
// short link: <dir>/l/<mount>/<n>, which points to the open directory's name in /proc. Where the process runs in the
// directory of links, the links are relative and 500 lowers fit.
func (m *Mounter) mountWithCommand(spec Spec, target *os.File) error {
	id := strconv.FormatUint(m.link.Add(1), 36)
	dir := filepath.Join(m.links, id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of a mount's links: %w", err)
	}
	defer os.RemoveAll(dir)

	prefix := dir
	if workingDir, err := os.Getwd(); err == nil && workingDir == m.links {
		prefix = id
	}
	link := func(name string, dir *os.File) (string, error) {
		if err := os.Symlink(processPath(dir), filepath.Join(m.links, id, name)); err != nil {
			return "", fmt.Errorf("make a short link to %s: %w", dir.Name(), err)
		}
		return prefix + "/" + name, nil
	}
	lowers := make([]string, len(spec.Lowers))
	for i, lower := range spec.Lowers {
		var err error
		if lowers[i], err = link(strconv.FormatInt(int64(i), 36), lower); err != nil {
			return err
		}
	}
	options := []string{"lowerdir=" + strings.Join(lowers, ":")}
	if spec.Upper != nil {
		upper, err := link("U", spec.Upper)
		if err != nil {
			return err
		}
		work, err := link("W", spec.Work)
		if err != nil {
			return err
		}
		options = append(options, "upperdir="+upper, "workdir="+work)
		for _, option := range spec.upperOptions() {
			if option.value == "" {
				options = append(options, option.key)
			} else {
				options = append(options, option.key+"="+option.value)
			}
		}
	}
	if n := len(strings.Join(options, ",")); n > maxMountData {
		return fmt.Errorf("%w: %d layers make %d bytes of mount options, and this kernel takes %d: use fewer layers or Linux 6.7", errdefs.ErrInvalidArgument, len(lowers), n, maxMountData)
	}
	options = append(options, spec.Attributes.options()...)
	err := m.Interface.MountSensitiveWithoutSystemdWithMountFlags("overlay", processPath(target), "overlay", options, nil, []string{"--no-canonicalize"})
	if err != nil {
		return commandError(fmt.Errorf("mount an overlay at %s with mount(8): %w", target.Name(), err))
	}
	return nil
}

// commandError gives the errors of mount(8) that have a known cause the same meaning as the mount API's.
func commandError(err error) error {
	switch text := err.Error(); {
	case strings.Contains(text, "Too many levels of symbolic links"):
		return fmt.Errorf("%w: a layer is named twice or lies inside another one of the same volume: %w", errdefs.ErrInvalidArgument, err)
	case strings.Contains(text, "No space left on device"), strings.Contains(text, "not enough space"):
		return fmt.Errorf("%w: %w", errdefs.ErrResourceExhausted, err)
	}
	return err
}

// processPath names an open directory for a child process, by a path that cannot be made to lead elsewhere.
func processPath(f *os.File) string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
}
