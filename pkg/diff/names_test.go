package diff

import (
	"fmt"
	"strings"
	"testing"
)

// TestNamesOfDeepDirectories has as many directories in one another as a path can have, each with many long names.
func TestNamesOfDeepDirectories(t *testing.T) {
	var list []string
	for i := range 2 * keptNames {
		list = append(list, fmt.Sprintf("%s-%08d", strings.Repeat("n", 246), i))
	}
	w := walker{levels: []*level{{}}}
	for range maxPath / 2 {
		w.levels[len(w.levels)-1].names.list = list
		w.enter(&level{})
	}
	size := 0
	for _, l := range w.levels {
		size += l.names.size()
	}
	if size != w.outerNames || size > 5*maxOuterNames {
		t.Errorf("the names take %d MiB, and count as %d", size>>20, w.outerNames>>20)
	}
}
