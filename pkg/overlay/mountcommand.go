package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	mount "k8s.io/mount-utils"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// maxMountData is how much mount(2) takes of file-system options: a page less its end mark.
const maxMountData = 4095

// mountWithCommand mounts the overlay by mount(8), for kernels whose overlayfs does not take lowerdir+.
//
// mount(2) takes one page of options, in which `:`, `,` and `\` have meanings. Every directory is therefore named by a short link,
// MOUNT/N, which points to the open directory's path in /proc. mount(8) runs in the directory of these links, so that 500 lowers fit.
func (m *Mounter) mountWithCommand(spec Spec, target *os.File) error {
	links, err := m.makeScratch()
	if err != nil {
		return err
	}
	defer os.RemoveAll(links)
	options, err := linkOptions(spec, links)
	if err != nil {
		return err
	}
	if n := len(strings.Join(options, ",")); n > maxMountData {
		return fmt.Errorf("%w: %d layers make %d bytes of mount options, and this kernel takes %d; use fewer layers or Linux 6.7",
			errdefs.ErrInvalidArgument, len(spec.Lowers), n, maxMountData)
	}
	options = append(options, spec.Attributes.options()...)
	if err := m.runMount(mountSource, linux.ProcessPath(target), fsType, options); err != nil {
		return fmt.Errorf("mount an overlay at %s: %w", target.Name(), err)
	}
	if spec.Attributes.ReadOnly {
		return nil
	}
	view, err := linux.Open(nil, target.Name(), linux.O_PATH|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if err == nil {
		err = spec.checkWritable(view)
		view.Close()
	}
	if err != nil {
		err = errors.Join(err, m.Unmount(target.Name()))
	}
	return err
}

// linkOptions makes links to the directories of an overlay in dir, and returns the overlay's options with these links, relative to
// the directory that dir is in.
func linkOptions(spec Spec, dir string) ([]string, error) {
	link := func(name string, to *os.File) (string, error) {
		if err := os.Symlink(linux.ProcessPath(to), filepath.Join(dir, name)); err != nil {
			return "", fmt.Errorf("make a short link to %s: %w", to.Name(), err)
		}
		return filepath.Base(dir) + "/" + name, nil
	}
	lowers := make([]string, len(spec.Lowers))
	for i, lower := range spec.Lowers {
		var err error
		if lowers[i], err = link(strconv.FormatInt(int64(i), 36), lower); err != nil {
			return nil, err
		}
	}
	options := []string{"lowerdir=" + strings.Join(lowers, ":")}
	if spec.Upper == nil && !spec.followsLowers {
		return options, nil
	}
	if spec.Upper != nil {
		upper, err := link("U", spec.Upper)
		if err != nil {
			return nil, err
		}
		work, err := link("W", spec.Work)
		if err != nil {
			return nil, err
		}
		options = append(options, "upperdir="+upper, "workdir="+work)
	}
	for _, option := range spec.upperOptions() {
		options = append(options, option.String())
	}
	return options, nil
}

// String is the option as mount(8) takes it.
func (o option) String() string {
	if o.value == "" {
		return o.key
	}
	return o.key + "=" + o.value
}

// runMount runs mount(8) with mount-utils' arguments, in a directory and an environment of its own:
//
//   - The links in the options are relative to the directory.
//   - util-linux 2.39 and newer hand options to the mount API one by one, and Linux 6.5 and 6.6 take at most 256 bytes of each:
//     LIBMOUNT_FORCE_MOUNT2 has it use mount(2).
//   - mount(8) reports error numbers only as text (its exit status is 32 for all of them), in the language of the environment.
func (m *Mounter) runMount(source, target, fsType string, options []string) error {
	args, _ := mount.MakeMountArgsSensitiveWithMountFlags(source, target, fsType, options, nil, []string{"--no-canonicalize"})
	command := m.commands.Command("mount", args...)
	command.SetDir(m.scratch)
	command.SetEnv([]string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "LIBMOUNT_FORCE_MOUNT2=always"})
	output, err := command.CombinedOutput()
	if err == nil {
		return nil
	}
	text := strings.TrimSpace(string(output))
	err = fmt.Errorf("mount(8): %w: %s", err, text)
	switch {
	case strings.Contains(text, "Too many levels of symbolic links"):
		return fmt.Errorf("%w: a layer is named twice or lies inside another one of the same volume: %w", errdefs.ErrInvalidArgument, err)
	case strings.Contains(text, "No space left on device"), strings.Contains(text, "not enough space"):
		return fmt.Errorf("%w: %w", errdefs.ErrResourceExhausted, err)
	}
	return err
}
