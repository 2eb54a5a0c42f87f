package sandbox

import (
	"errors"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// permitted are the system calls of a program and of its dynamic linker, on all architectures: no socket, no other process, no signal, no
// name that is created or changed. execve is that of the helper; in the root it can only begin the program again. The others of the
// architecture are in architectureCalls.
var permitted = []uint32{
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_CLOSE, unix.SYS_OPENAT, unix.SYS_FSTAT, unix.SYS_LSEEK, unix.SYS_PREAD64,
	unix.SYS_MMAP, unix.SYS_MPROTECT, unix.SYS_MUNMAP, unix.SYS_BRK, unix.SYS_FUTEX,
	unix.SYS_EXECVE, unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_RT_SIGRETURN,
	unix.SYS_SET_TID_ADDRESS, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ, unix.SYS_GETRANDOM,
}

// filter is a seccomp filter.
type filter struct {
	program []unix.SockFilter
	header  unix.SockFprog
}

// Offsets in struct seccomp_data (include/uapi/linux/seccomp.h).
const (
	callOffset         = 0
	architectureOffset = 4
)

// newFilter returns a filter that permits the listed system calls. Others fail with ENOSYS, so that libraries of later versions find what
// the kernel has always had; those of another architecture's numbering end the process.
func newFilter() (*filter, error) {
	if architecture == 0 {
		return nil, errors.New("no list of system calls for this architecture")
	}
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		done  = unix.BPF_RET | unix.BPF_K
	)
	f := &filter{program: []unix.SockFilter{
		{Code: load, K: architectureOffset},
		{Code: equal, K: architecture, Jt: 1},
		{Code: done, K: unix.SECCOMP_RET_KILL_PROCESS},
		{Code: load, K: callOffset},
	}}
	for _, call := range slices.Concat(permitted, architectureCalls) {
		f.program = append(f.program, unix.SockFilter{Code: equal, K: call, Jf: 1}, unix.SockFilter{Code: done, K: unix.SECCOMP_RET_ALLOW})
	}
	f.program = append(f.program, unix.SockFilter{Code: done, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)})
	f.header = unix.SockFprog{Len: uint16(len(f.program)), Filter: &f.program[0]}
	return f, nil
}

// install installs the filter for the calling thread.
func (f *filter) install() error {
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&f.header)))
	if errno != 0 {
		return errno
	}
	return nil
}
