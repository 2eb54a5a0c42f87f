// Package needs says what a test cannot do without. A test whose needs are not met is skipped with that reason, or fails where
// OVERLAY_CSI_TEST_ALL is set, as in CI. It imports nothing of the project, so that the tests of every package can use it.
package needs

import (
	"errors"
	"os"
	"os/exec"
	"testing"
)

// Root is for a test that mounts, or does anything else that only root may do.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "this test needs root: it mounts file systems")
	}
}

// Program is for a test that ran a program: it looks whether err says that the program is not installed.
func Program(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, exec.ErrNotFound) {
		missing(t, err)
	}
}

// Installed is for a test that will run these programs.
func Installed(t testing.TB, programs ...string) {
	t.Helper()
	for _, program := range programs {
		_, err := exec.LookPath(program)
		Program(t, err)
	}
}

func missing(t testing.TB, reason any) {
	t.Helper()
	if os.Getenv("OVERLAY_CSI_TEST_ALL") != "" {
		t.Fatalf("%v (OVERLAY_CSI_TEST_ALL is set: nothing may be skipped)", reason)
	}
	t.Skip(reason)
}
