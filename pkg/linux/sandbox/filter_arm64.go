package sandbox

import "golang.org/x/sys/unix"

const architecture = unix.AUDIT_ARCH_AARCH64

var architectureCalls = []uint32{unix.SYS_FSTATAT}
