package kubelet

import (
	"os"
	"path/filepath"
	"testing"
)

func TestPodUID(t *testing.T) {
	for path, want := range map[string]string{
		"/var/lib/kubelet/pods/0123-4/volumes/kubernetes.io~csi/v/mount": "0123-4",
		"/var/lib/kubelet/pods/0123-4":                                   "",
		"/var/lib/kubelet/pods/":                                         "",
		"/var/lib/kubelet/pods/../x":                                     "",
		"/var/lib/kubelet/plugins/x/y":                                   "",
		"/var/lib/kubelet2/pods/a/b":                                     "",
		"/tmp/target":                                                    "",
	} {
		if got := Dir("/var/lib/kubelet").PodUID(path); got != want {
			t.Errorf("%s: %q instead of %q", path, got, want)
		}
	}
}

// TestPodGone: only a missing directory in a directory that is there is a proof.
func TestPodGone(t *testing.T) {
	dir := t.TempDir()
	d := Dir(dir)
	if d.PodGone("uid") {
		t.Error("there is no directory of pods: that is no proof")
	}
	if err := os.MkdirAll(filepath.Join(dir, "pods", "uid"), 0o755); err != nil {
		t.Fatal(err)
	}
	if d.PodGone("uid") {
		t.Error("the pod is there")
	}
	for _, unknown := range []string{"", ".", "..", "a/b"} {
		if d.PodGone(unknown) {
			t.Errorf("%q is no pod", unknown)
		}
	}
	if !d.PodGone("other") {
		t.Error("the pod is gone")
	}
}
