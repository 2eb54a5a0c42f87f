package linux

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Setpriority sets the niceness of the calling thread (setpriority(2)). The caller has to have locked its goroutine to it
// (runtime.LockOSThread).
func Setpriority(nice int) error {
	return os.NewSyscallError("setpriority", retry(func() error { return unix.Setpriority(unix.PRIO_PROCESS, 0, nice) }))
}

// BootID returns an ID of the time since the machine was started (random(4), boot_id).
func BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot ID: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}

// TimeSinceBoot returns how long ago the machine was started, with the time that it was suspended (clock_gettime(2), CLOCK_BOOTTIME).
func TimeSinceBoot() (time.Duration, error) {
	var since unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &since); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return time.Duration(since.Nano()), nil
}

// KernelVersion returns the version of the running kernel (uname(2)).
func KernelVersion() (major, minor int, err error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return 0, 0, os.NewSyscallError("uname", err)
	}
	return ParseKernelVersion(unix.ByteSliceToString(name.Release[:]))
}

// ParseKernelVersion returns the version that a kernel release such as 6.1.0-32-amd64 begins with.
func ParseKernelVersion(release string) (major, minor int, err error) {
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return 0, 0, fmt.Errorf("kernel release %q: %w", release, err)
	}
	return major, minor, nil
}

// startsHeld is how long the start of other processes waits for one caller of HoldStarts.
const startsHeld = time.Second

// HoldStarts lets this process start no other until release is called, but for a second at most: a file system that does not answer must
// not stop everything. A process that is being started has copies of all descriptors, also of those that are closed on exec(3), until it
// has become its program. What keeps a file system or a mount in use when it is closed here must have no copy.
func HoldStarts() (release func()) {
	// Package syscall holds the lock for writing when it starts a process.
	syscall.ForkLock.RLock()
	unlock := sync.OnceFunc(syscall.ForkLock.RUnlock)
	timer := time.AfterFunc(startsHeld, unlock)
	return func() {
		timer.Stop()
		unlock()
	}
}

// SetIdleIO has the disk serve the calling thread when nothing else is to be done, where the disk's scheduler knows such a thing
// (ioprio_set(2)). As for [Setpriority], the caller has locked its goroutine to the thread.
func SetIdleIO() error {
	// include/uapi/linux/ioprio.h.
	const (
		ofProcess = 1
		idleClass = 3 << 13
	)
	_, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, ofProcess, 0, idleClass)
	return os.NewSyscallError("ioprio_set", asError(errno))
}
