package store

import (
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// TestMergeNamesKeepsNoLists: many layers have the same long list, and a name of their own.
func TestMergeNamesKeepsNoLists(t *testing.T) {
	const layers, size = 64, 4 << 20
	file := filepath.Join(t.TempDir(), unpack.ImpliedName)
	var names []string
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range layers {
		content := strings.Repeat(strings.Repeat("n", 4000)+"\x00", size/4001) + strconv.Itoa(i) + "\x00"
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		more, err := unpack.ReadImplied(file)
		if err != nil {
			t.Fatal(err)
		}
		if names, err = mergeNames(names, more); err != nil {
			t.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if kept := int64(after.HeapAlloc) - int64(before.HeapAlloc); len(names) != layers+1 || kept > size {
		t.Errorf("%d names keep %d bytes of memory", len(names), kept)
	}
	runtime.KeepAlive(names)
}

// TestMergeNames has layers that have more directories together than one may have.
func TestMergeNames(t *testing.T) {
	var many, long []string
	for i := range unpack.MaxImplied {
		many = append(many, strconv.Itoa(i))
	}
	for i := range unpack.MaxImpliedBytes / 4001 {
		long = append(long, strings.Repeat("n", 3990)+strconv.Itoa(1_000_000_000+i))
	}
	for name, list := range map[string][]string{"number": many, "bytes": long} {
		t.Run(name, func(t *testing.T) {
			names, err := mergeNames(nil, list)
			if err != nil {
				t.Fatal(err)
			}
			if names, err = mergeNames(names, list); err != nil || len(names) != len(list) {
				t.Errorf("%d names of layers that have the same %d: %v", len(names), len(list), err)
			}
			if _, err = mergeNames(slices.Clip(names), []string{"another"}); name == "number" && !errdefs.IsResourceExhausted(err) {
				t.Errorf("%v, want ResourceExhausted", err)
			}
			if _, err = mergeNames(slices.Clip(names), []string{strings.Repeat("n", 4090)}); !errdefs.IsResourceExhausted(err) {
				t.Errorf("%v, want ResourceExhausted", err)
			}
		})
	}
}
