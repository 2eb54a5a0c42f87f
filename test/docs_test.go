package test

import (
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
)

// TestFlagsAreDocumented: docs/flags.md has what --help says.
func TestFlagsAreDocumented(t *testing.T) {
	docs := read(t, "docs/flags.md")
	for _, args := range [][]string{{"--help"}, {"controller", "--help"}} {
		help, err := exec.Command("go", append([]string{"run", "../cmd/overlay-csi"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, help)
		}
		if !strings.Contains(docs, string(help)) {
			t.Errorf("docs/flags.md is not what %s says: run make docs", args)
		}
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

var (
	fencePattern  = regexp.MustCompile("(?ms)^ *```([a-z]*)\n(.*?)^ *```$")
	spanPattern   = regexp.MustCompile("`([^`\n]+)`")
	linkPattern   = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	pathPattern   = regexp.MustCompile(`^(\.ci|charts|cmd|deploy|docs|pkg|test)/[A-Za-z0-9_./-]*$`)
	flagPattern   = regexp.MustCompile(`^--([a-z][a-z-]*)`)
	targetPattern = regexp.MustCompile(`\bmake ([a-z][a-z0-9-]*)\b`)
	testPattern   = regexp.MustCompile(`\b(Test|Fuzz|Benchmark)[A-Z]\w*`)
)

// othersFlags are flags that the documentation names and that are not the driver's.
var othersFlags = []string{
	"all", "context", "dry-run", "enable-distributed-snapshotting", "format", "help", "long", "name", "node-deployment", "pod", "push",
	"root-dir", "secret", "socket", "ultra",
}

// TestDocumentation compares what the pages name with what there is: links, paths, make targets, flags, tests and types.
func TestDocumentation(t *testing.T) {
	flags := read(t, "docs/flags.md")
	targets := makeTargets(t)
	tests := testNames(t)
	for _, page := range pages(t) {
		t.Run(page, func(t *testing.T) {
			text := read(t, page)
			checkLinks(t, page, text)
			checkNames(t, text, flags, targets)
			if page == "CONTRIBUTING.md" {
				for _, name := range testPattern.FindAllString(text, -1) {
					if !slices.ContainsFunc(tests, func(test string) bool { return strings.HasPrefix(test, name) }) {
						t.Errorf("no test begins with %s", name)
					}
				}
			}
		})
	}
}

// pages are the Markdown files of the repository, by their paths in it.
func pages(t *testing.T) []string {
	t.Helper()
	var found []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/proposals/*.md"} {
		paths, err := filepath.Glob("../" + pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			found = append(found, strings.TrimPrefix(path, "../"))
		}
	}
	return found
}

// checkLinks looks for the file and the heading of each link within the repository.
func checkLinks(t *testing.T, page, text string) {
	t.Helper()
	for _, match := range linkPattern.FindAllStringSubmatch(fencePattern.ReplaceAllString(text, ""), -1) {
		to, heading, _ := strings.Cut(match[1], "#")
		if strings.Contains(to, "://") {
			continue
		}
		target := page
		if to != "" {
			target = filepath.Join(filepath.Dir(page), to)
		}
		if _, err := os.Stat(filepath.Join("..", target)); err != nil {
			t.Errorf("link to %s: %v", match[1], err)
			continue
		}
		if heading != "" && !slices.Contains(anchors(read(t, target)), heading) {
			t.Errorf("link to %s: %s has no such heading", match[1], target)
		}
	}
}

// checkNames looks for the paths, make targets, flags and identifiers that a page names.
func checkNames(t *testing.T, text, flags string, targets []string) {
	t.Helper()
	commands := spanPattern.FindAllStringSubmatch(fencePattern.ReplaceAllString(text, ""), -1)
	for _, fence := range fencePattern.FindAllStringSubmatch(text, -1) {
		if fence[1] == "sh" {
			commands = append(commands, []string{"", fence[2]})
		}
	}
	for _, command := range commands {
		name := command[1]
		for _, target := range targetPattern.FindAllStringSubmatch(name, -1) {
			if !slices.Contains(targets, target[1]) {
				t.Errorf("%s: the Makefile has no such target", target[0])
			}
		}
		if pathPattern.MatchString(name) {
			if _, err := os.Stat("../" + name); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if flag := flagPattern.FindStringSubmatch(name); flag != nil && !slices.Contains(othersFlags, flag[1]) {
			if !strings.Contains(flags, " --"+flag[1]+" ") && !strings.Contains(flags, " --"+flag[1]+"[") {
				t.Errorf("--%s: docs/flags.md has no such flag", flag[1])
			}
		}
		if of, identifier, ok := strings.Cut(name, "."); ok && !declares(t, of, identifier) {
			t.Errorf("%s: pkg/%s declares no %s", name, of, identifier)
		}
	}
}

var exportedPattern = regexp.MustCompile(`^[A-Z]\w*$`)

// declares reports whether a package of the driver declares an exported identifier, and is true for what is none.
func declares(t *testing.T, name, identifier string) bool {
	t.Helper()
	paths, err := filepath.Glob("../pkg/" + name + "/*.go")
	if err != nil || len(paths) == 0 || !exportedPattern.MatchString(identifier) {
		return true
	}
	declaration := regexp.MustCompile(`(?m)^((type|func|var|const) |\t)` + identifier + `\b`)
	return slices.ContainsFunc(paths, func(path string) bool { return declaration.MatchString(read(t, strings.TrimPrefix(path, "../"))) })
}

// anchors are the headings of a page as links name them on GitHub.
func anchors(text string) []string {
	var found []string
	for line := range strings.Lines(fencePattern.ReplaceAllString(text, "")) {
		heading := strings.TrimLeft(line, "#")
		if heading == line || !strings.HasPrefix(heading, " ") {
			continue
		}
		anchor := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9':
				return r
			}
			return -1
		}, strings.ToLower(strings.TrimSpace(heading)))
		found = append(found, anchor)
	}
	return found
}

// TestPackageGraph: every arrow in docs/architecture.md is an import that mayImport has, every import of today follows arrows,
// and every package has a row in the table.
func TestPackageGraph(t *testing.T) {
	page := read(t, "docs/architecture.md")
	arrows := graph(t, page)
	permitted := map[string][]string{}
	for from, to := range mayImport {
		for _, name := range to {
			permitted[node(from)] = append(permitted[node(from)], node(name))
		}
	}
	for from, to := range arrows {
		for _, name := range to {
			if !slices.Contains(permitted[from], name) {
				t.Errorf("docs/architecture.md has an arrow from %s to %s, which is not in the map of packages", from, name)
			}
		}
	}
	for _, line := range list(t, "{{.ImportPath}}|{{range .Imports}}{{.}} {{end}}", module+"cmd/...", module+"pkg/...") {
		importPath, imports, _ := strings.Cut(line, "|")
		from := node(importPath)
		if from == "uppertest" {
			continue
		}
		if !strings.Contains(page, "| `"+strings.TrimPrefix(importPath, module)+"`") {
			t.Errorf("docs/architecture.md has no row for %s", importPath)
		}
		for _, imported := range strings.Fields(imports) {
			name := node(imported)
			if strings.HasPrefix(imported, module) && name != "linux" && !follows(arrows, from, name) {
				t.Errorf("docs/architecture.md: no arrows lead from %s to %s", from, name)
			}
		}
	}
}

// node is the name of a package in the graph.
func node(importPath string) string { return path.Base(importPath) }

// graph reads the arrows of the page's mermaid graph: "a & b --> c & d".
func graph(t *testing.T, page string) map[string][]string {
	t.Helper()
	arrows := map[string][]string{}
	for line := range strings.Lines(page) {
		from, to, ok := strings.Cut(strings.TrimSpace(line), " --> ")
		if !ok {
			continue
		}
		for _, name := range strings.Split(from, " & ") {
			arrows[name] = append(arrows[name], strings.Split(to, " & ")...)
		}
	}
	if len(arrows) == 0 {
		t.Fatal("docs/architecture.md has no graph")
	}
	return arrows
}

// follows reports whether arrows lead from one package to another.
func follows(arrows map[string][]string, from, to string) bool {
	return slices.ContainsFunc(arrows[from], func(next string) bool { return next == to || follows(arrows, next, to) })
}

func makeTargets(t *testing.T) []string {
	t.Helper()
	var targets []string
	for _, match := range regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`).FindAllStringSubmatch(read(t, "Makefile"), -1) {
		targets = append(targets, match[1])
	}
	return targets
}

// testNames are the names of the functions that go test runs.
func testNames(t *testing.T) []string {
	t.Helper()
	names := map[string]bool{}
	declaration := regexp.MustCompile(`(?m)^func ((Test|Fuzz|Benchmark)\w+)`)
	err := filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		for _, match := range declaration.FindAllStringSubmatch(read(t, strings.TrimPrefix(path, "../")), -1) {
			names[match[1]] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return slices.Collect(maps.Keys(names))
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
