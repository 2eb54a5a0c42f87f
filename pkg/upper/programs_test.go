package upper_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	utilexec "k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// watched are commands that write the mount table that they see beside the file that they are for.
type watched struct{ utilexec.Interface }

func (w watched) CommandContext(ctx context.Context, program string, args ...string) utilexec.Cmd {
	const script = `for last; do :; done; cat /proc/self/mounts >> "$(dirname "$last")/seen"; exec "$0" "$@"`
	return w.Interface.CommandContext(ctx, "sh", append([]string{"-c", script, program}, args...)...)
}

// TestImageProgramsSeeNoOtherImages: mkfs.ext4 and e2fsck open the loop device of each disk image in the mount table.
func TestImageProgramsSeeNoOtherImages(t *testing.T) {
	root := newDataRoot(t, "tmpfs")
	backends := upper.NewBackends(upper.Config{Root: root, MountDir: t.TempDir(), Discard: os.RemoveAll, Commands: watched{utilexec.New()}})
	for _, base := range []string{"a", "b", "c"} {
		u := newUpper(t, backends, root, upper.Location{Backend: upper.DiskImage, Base: base, Limit: upper.LimitOf(8 << 20)})
		// Again for e2fsck.
		for range 2 {
			if err := u.Release(t.Context()); err != nil {
				t.Fatal(err)
			}
			dirs, err := u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
			if err != nil {
				t.Fatal(err)
			}
			dirs.Close()
		}
		seen, err := os.ReadFile(filepath.Join(root.Name(), base, "seen"))
		if err != nil {
			t.Fatal(err)
		}
		if count := strings.Count(string(seen), "/dev/loop"); count > 0 {
			t.Errorf("the programs that made %s see %d mounted loop devices", base, count)
		}
	}
}

// withoutChrootEnv is set in the process that TestImageProgramsWithoutChroot runs without CAP_SYS_CHROOT.
const withoutChrootEnv = "OVERLAY_CSI_TEST_WITHOUT_CHROOT"

// TestImageProgramsWithoutChroot: to make a mount namespace takes CAP_SYS_ADMIN alone, to enter one takes CAP_SYS_CHROOT too (setns(2)).
// A driver that lacks it runs the programs where it is.
func TestImageProgramsWithoutChroot(t *testing.T) {
	if os.Getenv(withoutChrootEnv) == "" {
		needs.Root(t)
		needs.Installed(t, "setpriv")
		again := exec.Command("setpriv", "--bounding-set=-sys_chroot", os.Args[0], "-test.run=^TestImageProgramsWithoutChroot$", "-test.v")
		again.Env = append(os.Environ(), withoutChrootEnv+"=1")
		if output, err := again.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, output)
		}
		return
	}
	root := newDataRoot(t, "tmpfs")
	u := newUpper(t, newBackends(t, root), root, upper.Location{Backend: upper.DiskImage, Base: "a", Limit: upper.LimitOf(8 << 20)})
	// Again for e2fsck.
	for range 2 {
		prepareAndClose(t, u)
		if err := u.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
