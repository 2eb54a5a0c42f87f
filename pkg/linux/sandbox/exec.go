package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// user is the user and the group of the program. Nobody else has this number: systemd's ranges leave it unused.
	user = 2_000_000_030
	// memory is the maximum size of the program's address space in bytes. igzip takes 8 MiB.
	memory = 64 << 20
	// rootFD is the descriptor of the root in the helper.
	rootFD = 3
)

// Main is the helper of [Start]: it gives all rights up and becomes the program of the root that descriptor 3 is, with these arguments. It
// writes to standard error, and returns an exit status, only if it cannot.
func Main(args []string) int {
	// No allocation may need memory when there is a limit.
	debug.SetGCPercent(-1)
	// Some of the rights are those of a thread. execve(2) ends the others.
	runtime.LockOSThread()
	if err := become(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return 1
}

// limits are the program's resource limits. With 0 for its core dump, the node's core_pattern could still run a program on its memory, as
// root and outside of the container. 1 is too little for a file, and the kernel runs no program then (fs/coredump.c).
var limits = map[int]uint64{
	unix.RLIMIT_CORE: 1, unix.RLIMIT_FSIZE: 0, unix.RLIMIT_MEMLOCK: 0, unix.RLIMIT_MSGQUEUE: 0,
	unix.RLIMIT_NOFILE: 16, unix.RLIMIT_STACK: 1 << 20,
}

func become(args []string) error {
	path, err := syscall.BytePtrFromString("/" + programName)
	if err != nil {
		return err
	}
	argv, err := syscall.SlicePtrFromStrings(append([]string{programName}, args...))
	if err != nil {
		return err
	}
	envv, err := syscall.SlicePtrFromStrings([]string{"LD_LIBRARY_PATH=/"})
	if err != nil {
		return err
	}
	filter, err := newFilter()
	if err != nil {
		return err
	}
	steps := []struct {
		name string
		do   func() error
	}{
		{"close descriptors", closeDescriptors},
		{"enter the root", enterRoot},
		{"drop capabilities", dropBoundingSet},
		{"leave all groups", func() error { return syscall.Setgroups(nil) }},
		{"change the group", func() error { return syscall.Setresgid(user, user, user) }},
		{"change the user", func() error { return syscall.Setresuid(user, user, user) }},
		{"drop capabilities", dropCapabilities},
		// A change of the user has cleared it.
		{"end with the parent", func() error { return unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0) }},
		{"refuse new privileges", func() error { return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }},
		{"limit resources", limitResources},
		{"limit system calls", filter.install},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	_, _, errno := syscall.RawSyscall(syscall.SYS_EXECVE,
		uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envv[0])))
	return fmt.Errorf("execute the program: %w", errno)
}

// closeDescriptors has all descriptors but standard input and output closed when the program begins.
func closeDescriptors() error {
	return unix.CloseRange(2, ^uint(0), unix.CLOSE_RANGE_CLOEXEC)
}

func enterRoot() error {
	if err := unix.Fchdir(rootFD); err != nil {
		return err
	}
	return unix.Chroot(".")
}

// dropBoundingSet removes all capabilities that a program could get by its file.
func dropBoundingSet() error {
	for capability := uintptr(0); ; capability++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); err != nil {
			if capability > unix.CAP_CHOWN && errors.Is(err, unix.EINVAL) {
				// The kernel knows no more.
				return nil
			}
			return err
		}
	}
}

func dropCapabilities() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	var none [2]unix.CapUserData
	return unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0])
}

func limitResources() error {
	for resource, most := range limits {
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: most, Max: most}); err != nil {
			return err
		}
	}
	return unix.Setrlimit(unix.RLIMIT_AS, &unix.Rlimit{Cur: memory, Max: memory})
}
