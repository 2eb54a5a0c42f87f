package test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
)

// TestFlagsAreDocumented: docs/flags.md has what --help says.
func TestFlagsAreDocumented(t *testing.T) {
	help, err := exec.Command("go", "run", "../cmd/overlay-csi", "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, help)
	}
	docs, err := os.ReadFile("../docs/flags.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(docs), string(help)) {
		t.Error("docs/flags.md is not what --help says: run make docs")
	}
}

var update = flag.Bool("update", false, "write what is made from the code into docs/")

const (
	featuresBegin = "<!-- Made from pkg/overlay/features.go by make docs. -->\n"
	featuresEnd   = "<!-- End of what make docs writes. -->\n"
)

// TestKernelFeaturesAreDocumented: docs/operations.md has the table of kernel features that the code has. With -update it
// writes it.
func TestKernelFeaturesAreDocumented(t *testing.T) {
	const page = "docs/operations.md"
	text := read(t, page)
	before, rest, ok := strings.Cut(text, featuresBegin)
	old, after, ended := strings.Cut(rest, featuresEnd)
	if !ok || !ended {
		t.Fatalf("%s has no table between %q and %q", page, featuresBegin, featuresEnd)
	}
	table := "\n| feature | since Linux | what it is | without it |\n| --- | --- | --- | --- |\n"
	for _, feature := range overlay.KernelFeatures() {
		table += fmt.Sprintf("| `%s` | %s | %s | %s |\n", feature.Name, feature.Since, feature.What, feature.Fallback)
	}
	table += "\n"
	if old == table {
		return
	}
	if !*update {
		t.Fatalf("the table in %s is not made from the code: run make docs", page)
	}
	if err := os.WriteFile("../"+page, []byte(before+featuresBegin+table+featuresEnd+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

// read returns a file of the repository.
func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", path))
	if err != nil {
		t.Fatal(fmt.Errorf("read %s: %w", path, err))
	}
	return string(data)
}
