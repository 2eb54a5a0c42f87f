package overlay

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// mountWithAPI mounts the overlay with fsopen, fsconfig, fsmount and move_mount (fsopen(2) and following).
func (m *Mounter) mountWithAPI(spec Spec, target *os.File) error {
	fsContext, err := m.configure(spec)
	if err != nil {
		return err
	}
	defer fsContext.Close()
	if err := unix.FsconfigCreate(int(fsContext.Fd())); err != nil {
		return contextError(fsContext, "create", "overlay", err)
	}
	// fsmount takes MOUNT_ATTR_* flags: the MS_* ones of mount(2) have other values.
	fd, err := unix.Fsmount(int(fsContext.Fd()), unix.FSMOUNT_CLOEXEC, int(spec.Attributes.bits()))
	if err != nil {
		return contextError(fsContext, "fsmount", "overlay", err)
	}
	view := os.NewFile(uintptr(fd), "fsmount:overlay")
	defer view.Close()
	return attach(view, target)
}

// configure returns a file-system context that has every parameter of the overlay, and has mounted nothing yet.
func (m *Mounter) configure(spec Spec) (*os.File, error) {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen overlay: %w", err)
	}
	fsContext := os.NewFile(uintptr(fd), "fsopen:overlay")
	if err := m.setParameters(fsContext, spec); err != nil {
		fsContext.Close()
		return nil, err
	}
	return fsContext, nil
}

func (m *Mounter) setParameters(fsContext *os.File, spec Spec) error {
	for _, lower := range spec.Lowers {
		if err := m.setLayer(fsContext, "lowerdir+", lower); err != nil {
			return err
		}
	}
	if spec.Upper == nil {
		return nil
	}
	if err := m.setLayer(fsContext, "upperdir", spec.Upper); err != nil {
		return err
	}
	if err := m.setLayer(fsContext, "workdir", spec.Work); err != nil {
		return err
	}
	for _, option := range spec.upperOptions() {
		var err error
		if option.value == "" {
			err = unix.FsconfigSetFlag(int(fsContext.Fd()), option.key)
		} else {
			err = unix.FsconfigSetString(int(fsContext.Fd()), option.key, option.value)
		}
		if err != nil {
			return contextError(fsContext, "set "+option.key, option.value, err)
		}
	}
	return nil
}

// setLayer hands one directory to overlayfs. By descriptor, the kernel shows the directory's real path in mountinfo;
// by the descriptor's name in /proc, it shows that.
func (m *Mounter) setLayer(fsContext *os.File, key string, dir *os.File) error {
	set := setLayerPath
	if m.features.LayerFD {
		set = setLayerFD
	}
	if err := set(int(fsContext.Fd()), key, dir); err != nil {
		return contextError(fsContext, "set "+key, dir.Name(), err)
	}
	return nil
}

func setLayerFD(fsContext int, key string, dir *os.File) error {
	return unix.FsconfigSetFd(fsContext, key, int(dir.Fd()))
}

func setLayerPath(fsContext int, key string, dir *os.File) error {
	return unix.FsconfigSetString(fsContext, key, procPath(dir))
}

// contextError adds the kernel's own words, which stand in the context's message queue, to an errno of fsconfig.
func contextError(fsContext *os.File, action, value string, errno error) error {
	message := strings.Join(drain(fsContext), "; ")
	if message == "" {
		message = "the kernel log may say why"
	}
	err := fmt.Errorf("overlay: %s %q: %w (%s)", action, value, errno, message)
	switch {
	case errors.Is(errno, unix.ELOOP):
		return fmt.Errorf("%w: a layer is named twice or lies inside another one of the same volume: %w", errdefs.ErrInvalidArgument, err)
	case errors.Is(errno, unix.EBUSY):
		return fmt.Errorf("%w: %w", ErrUpperInUse, err)
	}
	return err
}

// drain reads the messages of a file-system context, one a read, each with a severity letter and a space in front.
func drain(fsContext *os.File) []string {
	var messages []string
	buffer := make([]byte, 1024)
	for {
		n, err := unix.Read(int(fsContext.Fd()), buffer)
		if err != nil || n <= 0 {
			return messages
		}
		_, message, _ := strings.Cut(string(buffer[:n]), " ")
		messages = append(messages, strings.TrimSpace(message))
	}
}
