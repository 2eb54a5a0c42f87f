package diff_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/diff"
)

// BenchmarkDiff lists and writes an upper of 10,000 files of 4 KiB.
func BenchmarkDiff(b *testing.B) {
	const dirs, files = 100, 100
	s := newStack(b)
	s.write(func(view string) {
		for d := range dirs {
			dir := filepath.Join(view, fmt.Sprint("dir-", d))
			must(b, os.Mkdir(dir, 0o755))
			for f := range files {
				must(b, os.WriteFile(filepath.Join(dir, fmt.Sprint("file-", f)), make([]byte, 4096), 0o600))
			}
		}
	})
	tree := s.tree()
	b.Run("Walk", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			count := 0
			must(b, diff.Walk(b.Context(), tree, func(diff.Change) error { count++; return nil }))
			if count != dirs*(files+1) {
				b.Fatal(count)
			}
		}
	})
	b.Run("WriteLayer", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(dirs * files * 4096)
		for b.Loop() {
			must(b, diff.WriteLayer(b.Context(), tree, io.Discard))
		}
	})
}
