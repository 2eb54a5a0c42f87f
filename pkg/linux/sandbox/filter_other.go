//go:build !amd64 && !arm64

package sandbox

const architecture = 0

var architectureCalls []uint32
