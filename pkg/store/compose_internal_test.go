package store

import (
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

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
