package sandbox

import "golang.org/x/sys/unix"

const architecture = unix.AUDIT_ARCH_X86_64

var architectureCalls = []uint32{unix.SYS_NEWFSTATAT, unix.SYS_ARCH_PRCTL}
