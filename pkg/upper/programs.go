package upper

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"k8s.io/klog/v2"
	"k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// commands runs programs.
type commands = exec.Interface

// imagePrograms runs the programs that make and check disk images where they see nothing of what is mounted on the node. They read the
// mount table, and open each loop device in it to see whether the image is on it: they would take the longer the more volumes there are.
// Whether the image is on a loop device, the driver has looked already.
type imagePrograms struct {
	commands
	// namespace is nil where they are run as others.
	namespace *os.File
}

// newImagePrograms returns the programs, which are run as others where the node does not allow it otherwise.
func newImagePrograms(commands commands) imagePrograms {
	p := imagePrograms{commands: commands}
	if !p.isOnRootMount() {
		return p
	}
	namespace, err := newEnterableNamespace()
	if err != nil {
		klog.Background().V(2).Info("Disk images are made and checked in this mount namespace, which takes the longer the more is mounted",
			keyReason, err.Error())
		return p
	}
	p.namespace = namespace
	return p
}

const keyReason = "reason"

// newEnterableNamespace returns a bare mount namespace, or an error where it cannot be entered: that takes CAP_SYS_CHROOT too (setns(2)).
func newEnterableNamespace() (*os.File, error) {
	root, err := linux.OpenDir("/")
	if err != nil {
		return nil, err
	}
	defer root.Close()
	namespace, err := linux.NewBareNamespace()
	if err != nil {
		return nil, err
	}
	if err := linux.InMountNamespace(namespace, root, func() error { return nil }); err != nil {
		namespace.Close()
		return nil, err
	}
	return namespace, nil
}

// isOnRootMount reports whether what the programs need is on the root mount: they themselves, their libraries and their configuration.
func (p imagePrograms) isOnRootMount() bool {
	root, err := linux.StatMount(nil, "/")
	if err != nil {
		return false
	}
	needed := []string{"/usr", "/lib", "/lib64", "/etc", "/etc/mke2fs.conf", "/etc/e2fsck.conf"}
	for _, program := range []string{makeExt4, checkExt4} {
		path, err := p.LookPath(program)
		if err != nil {
			return false
		}
		needed = append(needed, path)
	}
	for _, path := range needed {
		path, err := filepath.EvalSymlinks(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false
		}
		if stat, err := linux.StatMount(nil, path); err != nil || stat.MountID != root.MountID {
			return false
		}
	}
	return true
}

// run runs a program in a directory, and returns what it printed. Its arguments name files relative to that.
func (p imagePrograms) run(ctx context.Context, dir, program string, args ...string) (output []byte, err error) {
	command := p.CommandContext(ctx, program, args...)
	if p.namespace == nil {
		command.SetDir(dir)
		return command.CombinedOutput()
	}
	// The directory may be on a mount that the namespace does not have.
	opened, err := linux.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	err = linux.InMountNamespace(p.namespace, opened, func() (err error) {
		output, err = command.CombinedOutput()
		return err
	})
	return output, err
}
