package overlay

import (
	"fmt"
	"os"
	osexec "os/exec"
	"sync"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// TestUnmountedWhileProcessesStart: the driver starts programs for some volumes while it mounts others. A process that is being started
// has copies of all descriptors, and those of a mount must not keep the view's upper in use, or the view busy, when it has been unmounted.
func TestUnmountedWhileProcessesStart(t *testing.T) {
	const rounds, starters = 300, 4
	needs.Root(t)
	m := mounters(t)["by descriptor"]
	dir := tmpfs(t)
	var group sync.WaitGroup
	end := make(chan struct{})
	defer group.Wait()
	defer close(end)
	for range starters {
		group.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
					_ = osexec.Command("/bin/true").Run()
				}
			}
		})
	}
	lower, target := open(t, dir+"/lower"), open(t, dir+"/target")
	used, busy := 0, 0
	for i := range rounds {
		spec := Spec{
			Lowers: []*os.File{lower}, Upper: open(t, fmt.Sprintf("%s/%d/upper", dir, i)), Work: open(t, fmt.Sprintf("%s/%d/work", dir, i)),
		}
		if err := m.Overlay(spec, target); err != nil {
			t.Fatal(err)
		}
		if m.Unmount(target.Name()) != nil {
			busy++
			if err := linux.UnmountLazily(target.Name()); err != nil {
				t.Fatal(err)
			}
		}
		inUse, err := m.UpperInUse(spec.Upper)
		if err != nil {
			t.Fatal(err)
		}
		if inUse {
			used++
		}
	}
	if used > 0 || busy > 0 {
		t.Errorf("of %d views, %d were busy, and %d uppers were in use after their view had been unmounted", rounds, busy, used)
	}
}
