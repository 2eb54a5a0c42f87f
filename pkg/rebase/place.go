package rebase

import (
	"slices"
	"strings"
)

// maxPath is how many bytes of a path are kept (PATH_MAX, less the zero byte at its end).
const maxPath = 4095

// place is where an entry is: a name, or a path of several, in another place. It is no string, because in a deep tree those of all levels
// together would take half a gigabyte. That of the root is zero.
type place struct {
	above *place
	name  string
}

// String returns the path from the root. Of one that no system call takes, because it is too long, it is the end, after "…".
func (p *place) String() string {
	var names []string
	size := 0
	for ; p.above != nil; p = p.above {
		if size += len(p.name) + 1; size > maxPath {
			names = append(names, "…")
			break
		}
		names = append(names, p.name)
	}
	slices.Reverse(names)
	return strings.Join(names, "/")
}
