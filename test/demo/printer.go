package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// printer writes the demo for a person: in colour on a terminal, plain elsewhere.
type printer struct {
	out      *os.File
	colour   bool
	dir      string
	chapters int
}

const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	green = "32"
	cyan  = "36"
)

func newPrinter(out *os.File) *printer {
	_, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS)
	return &printer{out: out, colour: err == nil && os.Getenv("NO_COLOR") == ""}
}

func (p *printer) paint(code, text string) string {
	if !p.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// short leaves the demo's own directory out of a path.
func (p *printer) short(path string) string {
	return strings.ReplaceAll(path, p.dir, "…")
}

func (p *printer) chapter(text string) {
	p.chapters++
	fmt.Fprintf(p.out, "\n%s\n", p.paint(bold, fmt.Sprintf("%d. %s", p.chapters, text)))
	if p.chapters == 1 {
		fmt.Fprintln(p.out, p.paint(dim, "   (… stands for "+p.dir+")"))
	}
}

func (p *printer) note(format string, args ...any) {
	fmt.Fprintf(p.out, "   %s %s\n", p.paint(green, "✓"), fmt.Sprintf(format, args...))
}

func (p *printer) command(text string) {
	fmt.Fprintf(p.out, "   %s\n", p.paint(cyan, "$ "+text))
}

func (p *printer) field(name, value string) {
	fmt.Fprintf(p.out, "   %s %s\n", p.paint(dim, fmt.Sprintf("%-9s", name)), p.short(value))
}

// mount shows the directories of a mounted view, and returns the lower ones.
func (p *printer) mount(options []string) (lowers []string) {
	for _, o := range options {
		name, value, _ := strings.Cut(o, "=")
		switch name {
		case "lowerdir+":
			lowers = append(lowers, value)
			p.field("lowerdir", value)
		case "lowerdir":
			lowers = strings.Split(value, ":")
			p.field("lowerdir", value)
		case "upperdir", "workdir":
			p.field(name, value)
		}
	}
	return lowers
}

func (p *printer) file(label, path string) {
	content, err := os.ReadFile(path)
	if err != nil {
		content = []byte(err.Error())
	}
	lines := strings.Split(strings.TrimSuffix(string(content), "\n"), "\n")
	fmt.Fprintf(p.out, "   %s %s\n", p.paint(dim, fmt.Sprintf("%-17s", label)), strings.Join(lines, p.paint(dim, " ⏎ ")))
}

// tree shows the files beneath a directory, with whiteouts as what they are.
func (p *printer) tree(label, dir string) {
	fmt.Fprintf(p.out, "   %s %s\n", p.paint(bold, label), p.paint(dim, p.short(dir)))
	_ = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == dir || entry.IsDir() {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		if entry.Type()&fs.ModeCharDevice != 0 {
			fmt.Fprintf(p.out, "     %s\n", p.paint(red, fmt.Sprintf("%-16s (whiteout)", name)))
			return nil
		}
		content, err := os.ReadFile(path)
		first, _, _ := strings.Cut(string(content), "\n")
		fmt.Fprintf(p.out, "     %-16s %s\n", name, p.paint(dim, first))
		return err
	})
}

func (p *printer) failed(err error) {
	fmt.Fprintf(os.Stderr, "\n%s %v\n", p.paint(red, "✗ Not as it should be:"), err)
}

func (p *printer) done() {
	fmt.Fprintf(p.out, "\n%s\n", p.paint(green, "Every step was as it says."))
}
