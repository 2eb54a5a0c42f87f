package integration

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestGzipProgram has a large layer decompressed by igzip, and without it, by the driver itself.
func TestGzipProgram(t *testing.T) {
	var content strings.Builder
	for i := range 700_000 {
		fmt.Fprintf(&content, "%x", i*i*31)
	}
	const inDriver = "Decompressing in the driver itself"
	for name, c := range map[string]struct {
		args     []string
		inDriver bool
	}{
		"igzip":   {nil, false},
		"none":    {[]string{"--gzip-program="}, false},
		"missing": {[]string{"--gzip-program=/no/such/program"}, true},
		"another": {[]string{"--gzip-program=/bin/cat"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "igzip" {
				needs.Installed(t, "igzip")
			}
			node := startNode(t, c.args...)
			r := startRegistry(t, node, registrytest.Options{})
			ref := pushImage(t, r, "large:1", map[string]string{"file": content.String()})
			pod := newPod(t, node, "pod")
			wantFile(t, filepath.Join(publish(t, pod, inline("layers", ref)), "file"), content.String())
			if strings.Contains(node.Log(), inDriver) != c.inDriver {
				t.Errorf("log: %s", node.Log())
			}
		})
	}
}
