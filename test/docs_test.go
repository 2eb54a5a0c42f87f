package test

import (
	"os"
	"os/exec"
	"strings"
	"testing"
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
