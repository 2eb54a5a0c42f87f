package upper_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	utilexec "k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// killed are commands of which one is killed whenever it runs.
type killed struct {
	utilexec.Interface
	program string
}

func (k killed) CommandContext(ctx context.Context, program string, args ...string) utilexec.Cmd {
	if program == k.program {
		return k.Interface.CommandContext(ctx, "sh", "-c", "kill -KILL $$")
	}
	return k.Interface.CommandContext(ctx, program, args...)
}

// TestKilledCheck has e2fsck killed, as by the kernel for its memory: nothing is known of the image, and it is not mounted.
func TestKilledCheck(t *testing.T) {
	root := newDataRoot(t, "tmpfs")
	at := upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(8 << 20)}
	u := newUpper(t, newBackends(t, root), root, at)
	dirs, err := u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
	if err != nil {
		t.Fatal(err)
	}
	dirs.Close()
	if err := u.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	mountDir := t.TempDir()
	u = upper.NewBackends(upper.Config{
		Root: root, MountDir: mountDir, Discard: os.RemoveAll, Commands: killed{utilexec.New(), "e2fsck"},
	}).Open(at)
	if dirs, err = u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755}); err == nil {
		dirs.Close()
		if err := u.Release(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if !errdefs.IsUnavailable(err) {
		t.Errorf("Prepare after a check that was killed: %v, want Unavailable", err)
	}
	if left, err := filepath.Glob(filepath.Join(mountDir, "*")); err != nil || len(left) != 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}
