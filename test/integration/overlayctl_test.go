package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestOverlayctl runs the program as an operator does.
func TestOverlayctl(t *testing.T) {
	node := startNode(t, "--layer-gc-min-age=0s")
	r := startRegistry(t, node, registrytest.Options{})
	pushImage(t, r, "a:1", map[string]string{"f": "f"}, map[string]string{"g": "g"})
	pushImage(t, r, "b:1", map[string]string{"h": "h"})
	run := func(args ...string) string {
		t.Helper()
		output, err := exec.Command(overlayctlBinary(t), append([]string{"--socket", node.AdminSocket()}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("overlayctl %v: %v\n%s", args, err, output)
		}
		return string(output)
	}
	var pulled api.Image
	must(t, json.Unmarshal([]byte(run("pull", "-o", "json", r.Host+"/a:1")), &pulled))
	if len(pulled.Layers) != 2 {
		t.Errorf("pulled %+v", pulled)
	}
	if output := run("pull", "oci://"+r.Host+"/b:1"); !strings.Contains(output, r.Host+"/b:1") {
		t.Errorf("pull says %q", output)
	}
	pod := newPod(t, node, "pod")
	v := inline("layers", "oci://"+r.Host+"/a:1")
	target := publish(t, pod, v)
	id := pod.Request(v).GetVolumeId()
	if output := run("layers"); strings.Count(output, id) != 2 || strings.Count(output, "sha256:") != 3 ||
		!strings.Contains(output, "DIFF ID") {
		t.Errorf("layers says\n%s", output)
	}
	if output := run("images"); !strings.Contains(output, r.Host+"/a:1") || !strings.Contains(output, r.Host+"/b:1") {
		t.Errorf("images says\n%s", output)
	}
	var described []api.Volume
	must(t, json.Unmarshal([]byte(run("inspect", id)), &described))
	publication := described[0].Publications[0]
	data := publication.Data
	lowers := strings.Split(data.LowerDir, ":")
	if data.MergedDir != target || data.UpperDir != upperDir(node, pod, v) || len(lowers) != 2 || !publication.Mounted {
		t.Errorf("inspect says %+v", described)
	}
	wantFile(t, filepath.Join(lowers[0], "g"), "g")
	if output := run("gc", "--all", "--dry-run"); !strings.Contains(output, "1 layers") {
		t.Errorf("gc --dry-run says %q", output)
	}
	if output := run("gc"); !strings.Contains(output, "0 layers") {
		t.Errorf("gc says %q", output)
	}
	if output := run("gc", "--all"); !strings.Contains(output, "1 layers") {
		t.Errorf("gc --all says %q", output)
	}
	if output := run("layers", "-o", "json"); strings.Count(output, `"diffID"`) != 2 {
		t.Errorf("layers -o json says %s", output)
	}
	unpublish(t, pod, v)
	for name, c := range map[string]struct {
		args []string
		word string
	}{
		"no driver":       {[]string{"--socket", "/nowhere", "layers"}, "running"},
		"no such volume":  {[]string{"--socket", node.AdminSocket(), "inspect", "missing"}, "does not exist"},
		"no such image":   {[]string{"--socket", node.AdminSocket(), "pull", r.Host + "/missing:1"}, r.Host},
		"no such form":    {[]string{"--socket", node.AdminSocket(), "layers", "-o", "xml"}, "table and json"},
		"no such command": {[]string{"fly"}, "fly"},
	} {
		t.Run(name, func(t *testing.T) {
			output, err := exec.Command(overlayctlBinary(t), c.args...).CombinedOutput()
			if err == nil || !strings.Contains(string(output), c.word) {
				t.Errorf("%v: %s", err, output)
			}
		})
	}
	info, err := os.Stat(node.AdminSocket())
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %s", info.Mode())
	}
}
