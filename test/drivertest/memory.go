package drivertest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// LimitMemory gives the running driver a cgroup with this limit in bytes, as the chart gives its container one. The kernel kills the
// driver above it. It returns an error where no such cgroup can be made. remove moves the driver out and removes the cgroup.
func (n *Node) LimitMemory(bytes int64) (remove func() error, err error) {
	for _, version := range []struct{ root, limit string }{
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes"},
		{"/sys/fs/cgroup", "memory.max"},
	} {
		group := filepath.Join(version.root, "overlay-csi-"+strconv.Itoa(n.PID()))
		if made := os.Mkdir(group, 0o755); made != nil {
			err = errors.Join(err, made)
			continue
		}
		failed := set(filepath.Join(group, version.limit), bytes)
		if failed == nil {
			failed = n.moveTo(group)
		}
		if failed != nil {
			err = errors.Join(err, failed, os.Remove(group))
			continue
		}
		return func() error {
			if n.running != nil {
				if err := n.moveTo(version.root); err != nil {
					return err
				}
			}
			return os.Remove(group)
		}, nil
	}
	return nil, fmt.Errorf("limit the memory of the driver: %w", err)
}

// moveTo moves the driver to a cgroup.
func (n *Node) moveTo(group string) error {
	return set(filepath.Join(group, "cgroup.procs"), int64(n.PID()))
}

// set writes a number to a file of the kernel. It makes no file: a cgroup has none for memory if its parent does not control that.
func set(path string, value int64) error {
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(strconv.FormatInt(value, 10))
	return errors.Join(err, file.Close())
}

// ResetPeakMemory makes PeakMemory begin again with what the driver takes now (proc_pid_clear_refs(5)).
func (n *Node) ResetPeakMemory() error {
	return set(fmt.Sprintf("/proc/%d/clear_refs", n.PID()), 5)
}

// PeakMemory is the most memory in bytes that the driver has had (proc_pid_status(5), VmHWM).
func (n *Node) PeakMemory() (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.PID()))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kibibytes, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			return kibibytes << 10, err
		}
	}
	return 0, errors.New("the kernel does not say how much memory the driver has had")
}
