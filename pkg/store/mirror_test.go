package store_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestMirror pulls by way of a mirror in hosts.toml, and checks the errors for an invalid hosts.toml.
func TestMirror(t *testing.T) {
	n := newNode(t)
	mirror, err := registrytest.Start(registrytest.Options{})
	must(t, err)
	defer mirror.Close()
	pinned := push(t, mirror, "team/data:1", image(t, layer(t, registrytest.File("f", "x"))))
	dir := filepath.Join(n.certsDir, "registry.example")
	must(t, os.MkdirAll(dir, 0o755))
	hosts := filepath.Join(dir, "hosts.toml")
	text := fmt.Sprintf("server = \"https://registry.invalid\"\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", mirror.Host)
	must(t, os.WriteFile(hosts, []byte(text), 0o644))
	_, id, _ := strings.Cut(pinned, "@")
	n.mustPull("registry.example/team/data@" + id)
	lease, err := n.pull("registry.example/team/data:1", "", registry.Credentials{})
	must(t, err)
	lease.Release()
	for name, text := range map[string]string{
		"no TOML":            "server = [",
		"no such capability": "[host.\"http://x\"]\ncapabilities=[\"fly\"]",
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.WriteFile(hosts, []byte(text), 0o644))
			_, err := n.pull("registry.example/team/data:1", "", registry.Credentials{})
			wantError(t, err, "hosts.toml", "registry.example")
			if !errdefs.IsFailedPrecondition(err) && !errdefs.IsUnavailable(err) {
				t.Error(err)
			}
		})
	}
}
