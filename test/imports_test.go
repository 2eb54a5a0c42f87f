// Package test asserts what holds for the project as a whole.
package test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/overlay-csi/overlay-csi/"

// TestImports holds the direction of imports: driver → volume → {layer, upper, overlay}, layer → {store, kubelet}, and
// all → linux. Only driver, and kubelet's own registration API, know gRPC.
func TestImports(t *testing.T) {
	allowed := map[string][]string{
		"pkg/driver":    {"pkg/volume", "pkg/layer", "pkg/overlay", "pkg/reference"},
		"pkg/admin":     {"pkg/volume", "pkg/store"},
		"pkg/volume":    {"pkg/layer", "pkg/reference", "pkg/upper", "pkg/overlay"},
		"pkg/layer":     {"pkg/reference", "pkg/store", "pkg/kubelet"},
		"pkg/reference": {},
		"pkg/store":     {},
		"pkg/upper":     {},
		"pkg/overlay":   {},
		// The suite that every upper passes.
		"pkg/upper/uppertest": {"pkg/upper"},
		"pkg/kubelet":         {},
		"pkg/linux":           {},
	}
	grpcUsers := []string{"pkg/driver", "pkg/kubelet"}
	for _, line := range list(t, "{{.ImportPath}}|{{range .Imports}}{{.}} {{end}}", module+"pkg/...") {
		path, imports, _ := strings.Cut(line, "|")
		name := strings.TrimPrefix(path, module)
		permitted, known := allowed[name]
		if !known {
			t.Errorf("%s is not in the map of packages: add it with what it may import", name)
			continue
		}
		for _, imported := range strings.Fields(imports) {
			if ours, ok := strings.CutPrefix(imported, module); ok && ours != "pkg/linux" && !slices.Contains(permitted, ours) {
				t.Errorf("%s imports %s", name, ours)
			}
			isGRPC := strings.HasPrefix(imported, "google.golang.org/grpc") || strings.Contains(imported, "container-storage-interface")
			if isGRPC && !slices.Contains(grpcUsers, name) {
				t.Errorf("%s knows gRPC: %s", name, imported)
			}
		}
	}
}

// TestNothingOfTheTestsIsInTheDriver keeps test code and test libraries out of the binary.
func TestNothingOfTheTestsIsInTheDriver(t *testing.T) {
	for _, path := range list(t, "{{.ImportPath}}", "-deps", module+"cmd/...") {
		if strings.HasPrefix(path, module+"test") || path == "testing" || strings.Contains(path, "csi-test") || strings.Contains(path, "onsi/") {
			t.Errorf("the driver has %s in it", path)
		}
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
