package test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/overlay-csi/overlay-csi/"

// mayImport is the map of packages, the topmost first: what each may import of this module. Every package may import pkg/linux.
var mayImport = map[string][]string{
	"cmd/overlay-csi": {
		"pkg/admin", "pkg/commit", "pkg/dataroot", "pkg/driver", "pkg/gunzip", "pkg/image", "pkg/kubeapi", "pkg/kubelet", "pkg/layer",
		"pkg/linux/sandbox", "pkg/metrics", "pkg/overlay", "pkg/overlaynode", "pkg/record", "pkg/registry", "pkg/store", "pkg/store/access",
		"pkg/unpack", "pkg/upper", "pkg/volume", "pkg/volume/portable",
	},
	"cmd/overlayctl":      {"pkg/admin/api"},
	"cmd/kubectl-overlay": {},
	"pkg/admin": {
		"pkg/admin/api", "pkg/cache", "pkg/commit", "pkg/diff", "pkg/image", "pkg/image/compose", "pkg/rebase", "pkg/record", "pkg/reference",
		"pkg/registry", "pkg/spec", "pkg/store", "pkg/volume",
	},
	"pkg/admin/api": {},
	"pkg/metrics":   {"pkg/cache", "pkg/overlay", "pkg/record", "pkg/store", "pkg/volume"},
	"pkg/driver": {
		"pkg/kubeapi", "pkg/kubelet", "pkg/layer", "pkg/overlay", "pkg/overlaynode", "pkg/rebase", "pkg/record", "pkg/reference",
		"pkg/spec", "pkg/volume", "pkg/volume/portable",
	},
	"pkg/overlaynode": {},
	"pkg/volume": {
		"pkg/cache", "pkg/dataroot", "pkg/diff", "pkg/kubeapi", "pkg/kubelet", "pkg/layer", "pkg/overlay", "pkg/record", "pkg/reference",
		"pkg/rebase", "pkg/spec", "pkg/store", "pkg/upper", "pkg/volume/chown", "pkg/volume/flatten", "pkg/volume/lock",
		"pkg/volume/portable",
	},
	"pkg/cache":           {"pkg/record", "pkg/upper"},
	"pkg/volume/chown":    {},
	"pkg/volume/lock":     {},
	"pkg/volume/flatten":  {"pkg/record", "pkg/upper"},
	"pkg/volume/portable": {"pkg/commit", "pkg/image", "pkg/image/compose", "pkg/reference", "pkg/registry"},
	"pkg/rebase":          {"pkg/diff", "pkg/squash"},
	"pkg/diff":            {"pkg/unpack"},
	"pkg/layer": {
		"pkg/dataroot", "pkg/image", "pkg/kubeapi", "pkg/kubelet", "pkg/overlay", "pkg/reference", "pkg/registry", "pkg/store",
	},
	"pkg/store": {"pkg/dataroot", "pkg/gunzip", "pkg/image", "pkg/record", "pkg/reference", "pkg/registry", "pkg/store/access",
		"pkg/store/merged",
		"pkg/unpack"},
	"pkg/store/access":  {},
	"pkg/store/merged":  {"pkg/unpack"},
	"pkg/unpack":        {"pkg/erofs"},
	"pkg/erofs":         {},
	"pkg/registry":      {"pkg/image"},
	"pkg/commit":        {"pkg/image", "pkg/image/compose", "pkg/reference", "pkg/registry"},
	"pkg/image/compose": {"pkg/image"},
	"pkg/image":         {"pkg/unpack"},
	"pkg/record": {
		"pkg/dataroot", "pkg/kubeapi", "pkg/kubelet", "pkg/overlay", "pkg/rebase", "pkg/reference", "pkg/spec", "pkg/upper",
	},
	"pkg/upper":           {"pkg/dataroot", "pkg/kubelet", "pkg/overlay", "pkg/squash"},
	"pkg/upper/uppertest": {"pkg/upper"},
	"pkg/squash":          {},
	"pkg/kubelet":         {},
	"pkg/kubeapi":         {"pkg/kubelet"},
	"pkg/spec":            {"pkg/reference"},
	"pkg/reference":       {},
	"pkg/dataroot":        {},
	"pkg/overlay":         {},
	"pkg/gunzip":          {"pkg/linux/sandbox"},
	"pkg/linux/sandbox":   {},
	"pkg/linux":           {},
}

// TestImports checks that imports go downward, that gRPC is known to the driver and to kubelet's registration alone, and that only
// pkg/linux makes system calls that the standard library lacks.
func TestImports(t *testing.T) {
	grpcUsers := []string{"pkg/driver", "pkg/kubelet", "cmd/overlay-csi"}
	for _, line := range list(t, "{{.ImportPath}}|{{range .Imports}}{{.}} {{end}}", module+"cmd/...", module+"pkg/...") {
		path, imports, _ := strings.Cut(line, "|")
		name := strings.TrimPrefix(path, module)
		t.Run(name, func(t *testing.T) {
			permitted, known := mayImport[name]
			if !known {
				t.Fatalf("%s is not in the map of packages: add it with what it may import", name)
			}
			for _, imported := range strings.Fields(imports) {
				if ours, ok := strings.CutPrefix(imported, module); ok && ours != "pkg/linux" && !slices.Contains(permitted, ours) {
					t.Errorf("%s imports %s", name, ours)
				}
				isGRPC := strings.HasPrefix(imported, "google.golang.org/grpc") || strings.Contains(imported, "container-storage-interface")
				if isGRPC && !slices.Contains(grpcUsers, name) {
					t.Errorf("%s imports %s of gRPC", name, imported)
				}
				if imported == "golang.org/x/sys/unix" && name != "pkg/linux" && name != "pkg/linux/sandbox" {
					t.Errorf("%s imports %s: system calls are in pkg/linux, error numbers in syscall", name, imported)
				}
			}
		})
	}
}

// TestMapOfPackages checks that the map itself has no cycle: a mistake in it would permit one that Go does not refuse,
// since Go looks at today's imports alone.
func TestMapOfPackages(t *testing.T) {
	var visit func(name string, path []string)
	visit = func(name string, path []string) {
		if slices.Contains(path, name) {
			t.Fatalf("cycle: %s → %s", strings.Join(path, " → "), name)
		}
		for _, imported := range mayImport[name] {
			visit(imported, append(path, name))
		}
	}
	for name := range mayImport {
		visit(name, nil)
	}
}

// TestDependencies checks what binaries are made of: no test code in any, no driver in overlayctl.
func TestDependencies(t *testing.T) {
	for name, unwanted := range map[string][]string{
		// Where text/template is in a program, the linker drops no exported method.
		"cmd/overlay-csi": {module + "test", "testing", "github.com/kubernetes-csi/csi-test", "github.com/onsi", "text/template"},
		"cmd/overlayctl": {
			module + "test", "testing", module + "pkg/store", module + "pkg/volume", module + "pkg/driver", "k8s.io/client-go", "k8s.io/api",
			"google.golang.org/grpc", "github.com/containerd/containerd",
		},
		"cmd/kubectl-overlay": {module + "test", module + "pkg", "testing", "google.golang.org/grpc"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, path := range list(t, "{{.ImportPath}}", "-deps", "-tags", "grpcnotrace", module+name) {
				for _, prefix := range unwanted {
					if path == prefix || strings.HasPrefix(path, prefix+"/") {
						t.Errorf("%s has %s in it", name, path)
					}
				}
			}
		})
	}
}

func list(t *testing.T, format string, args ...string) []string {
	t.Helper()
	output, err := exec.Command("go", append([]string{"list", "-f", format}, args...)...).Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return strings.Split(strings.TrimSpace(string(output)), "\n")
}
