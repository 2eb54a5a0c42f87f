package integration

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// overlayctl runs the program, and returns what it prints on both outputs.
func overlayctl(t *testing.T, node *drivertest.Node, args ...string) (string, error) {
	t.Helper()
	output, err := exec.Command(overlayctlBinary(t), append([]string{"--socket", node.AdminSocket()}, args...)...).CombinedOutput()
	return string(output), err
}

// TestDiffAndCommit looks at what was written to a claim, in use and at rest, and keeps it as a layer.
func TestDiffAndCommit(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		for name, keys := range map[string]map[string]string{
			"directory": {}, "image": {"sizeLimit": "64Mi", "sizeEnforcement": "image"}, "owner": {"layerOwner": "1000:1000"},
		} {
			t.Run(name, func(t *testing.T) {
				layers := layersOf(t, node, map[string]string{"f": "layer", "d/g": "layer", "d/h": "layer"})
				v := drivertest.Volume{Name: "data", ID: "claim-" + name, Claim: true, Attributes: map[string]string{"layers": layers}}
				for key, value := range keys {
					v.Attributes[key] = value
				}
				pod := newPod(t, node, "pod")
				target := publish(t, pod, v)
				write(t, filepath.Join(target, "f"), "pod")
				write(t, filepath.Join(target, "new"), "pod")
				must(t, os.Chown(filepath.Join(target, "new"), 1000, 1000))
				must(t, os.Rename(filepath.Join(target, "d"), filepath.Join(target, "moved")))
				must(t, os.Remove(filepath.Join(target, "moved/h")))
				const want = "D /d\nC /f\nA /moved\nA /moved/g\nA /new\n"
				if output, err := overlayctl(t, node, "diff", v.ID); err != nil || output != want {
					t.Errorf("in use: %v\n%s", err, output)
				}
				file := filepath.Join(t.TempDir(), "layer.tar")
				output, err := overlayctl(t, node, "commit", v.ID, "--output", file)
				if name == "image" {
					if err != nil || len(namesIn(t, file)) != 6 {
						t.Errorf("commit in use: %v\n%s", err, output)
					}
				} else {
					if err == nil || !strings.Contains(output, "stop the pods") {
						t.Errorf("commit in use: %v\n%s", err, output)
					}
					wantAbsent(t, file)
				}
				unpublish(t, pod, v)
				output, err = overlayctl(t, node, "diff", "-o", "json", v.ID)
				if err != nil || strings.Count(output, "\n") != 5 {
					t.Errorf("at rest: %v\n%s", err, output)
				}
				var change api.Change
				must(t, json.Unmarshal([]byte(strings.Split(output, "\n")[1]), &change))
				if change.Path != "f" || change.Kind != "C" || change.Size != 3 || !strings.HasPrefix(change.Mode, "-rw") {
					t.Errorf("%+v", change)
				}
				for range 2 {
					if output, err := overlayctl(t, node, "commit", v.ID, "--output", file); err != nil {
						t.Fatalf("commit: %v\n%s", err, output)
					}
					owner := 1000
					if name == "owner" {
						owner = 0 // In an image, the files are root's.
					}
					if got := namesIn(t, file); !slices.Equal(got, []string{
						"./ 0", ".wh.d 0", "f 0", "moved/ 0", "moved/g 0", fmt.Sprint("new ", owner),
					}) && name != "owner" {
						t.Errorf("the layer has %q", got)
					} else if name == "owner" && got[len(got)-1] != "new 0" {
						t.Errorf("the layer has %q", got)
					}
				}
				// The volume goes on with what it had.
				target = publish(t, pod, v)
				wantFile(t, filepath.Join(target, "f"), "pod")
				wantFile(t, filepath.Join(target, "moved/g"), "layer")
				wantAbsent(t, filepath.Join(target, "moved/h"))
				write(t, filepath.Join(target, "later"), "x")
				if output, err := overlayctl(t, node, "diff", v.ID); err != nil || output != "D /d\nC /f\nA /later\nA /moved\nA /moved/g\nA /new\n" {
					t.Errorf("after a commit: %v\n%s", err, output)
				}
				unpublish(t, pod, v)
				removePod(t, pod)
			})
		}
	})
}

// namesIn returns the names and owners in a tar.
func namesIn(t *testing.T, path string) (names []string) {
	t.Helper()
	file, err := os.Open(path)
	must(t, err)
	defer file.Close()
	for reader := tar.NewReader(file); ; {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return names
		}
		must(t, err)
		names = append(names, fmt.Sprint(header.Name, " ", header.Uid))
	}
}

// TestDiffHoldsNobodyUp has a client that does not read what it asked for. The volume is unpublished and published all the same.
func TestDiffHoldsNobodyUp(t *testing.T) {
	node := startNode(t)
	v := drivertest.Volume{Name: "data", ID: "claim-1", Claim: true, Attributes: map[string]string{
		"layers": layersOf(t, node, map[string]string{"f": "layer"}),
	}}
	pod := newPod(t, node, "pod")
	target := publish(t, pod, v)
	for i := range 20_000 {
		write(t, filepath.Join(target, fmt.Sprintf("%s-%d", strings.Repeat("name", 40), i)), "")
	}
	for _, step := range []struct {
		name string
		do   func()
	}{
		{"unpublish", func() { unpublish(t, pod, v) }},
		{"publish", func() { publish(t, pod, v) }},
		{"unpublish again", func() { unpublish(t, pod, v) }},
	} {
		listing, ended, goOn := make(chan struct{}), make(chan error, 1), make(chan struct{})
		go func() {
			first := true
			ended <- node.Admin().Diff(timeout(t), v.ID, "", func(api.Change) error {
				if first {
					close(listing)
					<-goOn
					first = false
				}
				return nil
			})
		}()
		<-listing
		step.do()
		close(goOn)
		if err := <-ended; err == nil {
			t.Errorf("%s: the list is complete", step.name)
		}
	}
}

// TestDiffOfWhatHasNone says why there is nothing to see.
func TestDiffOfWhatHasNone(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	pod, other := newPod(t, node, "pod"), newPod(t, node, "other")
	shared := drivertest.Volume{Name: "shared", ID: "shared", Claim: true, Attributes: map[string]string{"layers": layers, "upper": "pod"}}
	readOnly := inline("layers", layers, "upper", "none")
	publish(t, pod, shared)
	write(t, filepath.Join(publish(t, other, shared), "new"), "x")
	publish(t, pod, readOnly)
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"no volume":         {[]string{"diff", "nobody"}, "not found"},
		"read-only":         {[]string{"diff", pod.Request(readOnly).GetVolumeId()}, "upper: none"},
		"which pod":         {[]string{"diff", "shared"}, "say which pod"},
		"another pod":       {[]string{"diff", "shared", "--pod", "nobody"}, "no view"},
		"commit of a pod":   {[]string{"commit", "shared", "--output", "-"}, "upper claim"},
		"commit to no file": {[]string{"commit", "shared"}, "one of --output and --push"},
		"bad ID":            {[]string{"diff", "../x"}, "volume ID"},
	} {
		t.Run(name, func(t *testing.T) {
			if output, err := overlayctl(t, node, c.args...); err == nil || !strings.Contains(output, c.want) {
				t.Errorf("%v: %s", err, output)
			}
		})
	}
	if output, err := overlayctl(t, node, "diff", "shared", "--pod", other.UID); err != nil || output != "A /new\n" {
		t.Errorf("%v: %s", err, output)
	}
}
