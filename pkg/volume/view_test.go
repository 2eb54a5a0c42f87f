package volume

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/record"
)

func TestCheckIDAndTarget(t *testing.T) {
	for _, id := range []string{"pvc-1", "csi-0123", "a b", "ünï", "a..b", strings.Repeat("x", 128)} {
		if err := record.CheckID(id); err != nil {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, id := range []string{"", ".", "..", ".hidden", "a/b", "/", "a\x00", "a\nb", "\x7f", "\xff", strings.Repeat("x", 129)} {
		if err := record.CheckID(id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, target := range []string{"", "/", "a", "./a", "/a/../b", "/a//b", "/a/", "/a\x00", "/" + strings.Repeat("x", 5000)} {
		if err := CheckTarget(target); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.20q: %v", target, err)
		}
	}
}
