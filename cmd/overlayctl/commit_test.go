package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestOutputIsNoFile: what has the name of the output, and is no file, is not replaced.
func TestOutputIsNoFile(t *testing.T) {
	write := func(to io.Writer) error {
		_, err := io.WriteString(to, "layer")
		return err
	}
	dir := t.TempDir()
	pipe, link := filepath.Join(dir, "pipe"), filepath.Join(dir, "link")
	if err := errors.Join(syscall.Mkfifo(pipe, 0o600), os.Symlink(pipe, link)); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(pipe, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	for _, name := range []string{pipe, link} {
		before, err := os.Lstat(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := writeFile(name, write); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if after, err := os.Lstat(name); err != nil || after.Mode() != before.Mode() {
			t.Fatalf("%s is %v (%v)", name, after.Mode(), err)
		}
		content := make([]byte, len("layer"))
		if _, err := io.ReadFull(reader, content); err != nil || string(content) != "layer" {
			t.Errorf("%s has %q (%v)", name, content, err)
		}
	}
	if err := writeFile(dir, write); !errors.Is(err, syscall.EISDIR) {
		t.Errorf("a directory: %v", err)
	}
}
