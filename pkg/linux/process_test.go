package linux

import (
	"os/exec"
	"testing"
	"time"
)

// TestHoldStarts: no process is started before release, and none waits for a caller that does not come to it.
func TestHoldStarts(t *testing.T) {
	for name, released := range map[string]bool{"released": true, "a file system does not answer": false} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			release := HoldStarts()
			defer release()
			started := make(chan error)
			go func() { started <- exec.Command("/bin/true").Run() }()
			select {
			case err := <-started:
				if time.Since(began) < startsHeld {
					t.Errorf("a process was started, and has copies of the descriptors: %v", err)
				}
				return
			case <-time.After(startsHeld / 4):
			}
			if released {
				release()
			}
			select {
			case err := <-started:
				must(t, err)
			case <-time.After(30 * time.Second):
				t.Fatal("no process can be started")
			}
		})
	}
}
