package rebase

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/diff"
)

// Policy says what becomes of an entry that the uppers and the new layers changed, each in its own way.
type Policy string

// The policies.
const (
	Fail       Policy = "fail"        // nothing is rebased
	KeepUpper  Policy = "keep-upper"  // the entry of the uppers stays
	TakeLayers Policy = "take-layers" // the entry is that of the new layers
)

// ParsePolicy parses a policy. "" is Fail. It returns ErrInvalidArgument for an unknown one.
func ParsePolicy(text string) (Policy, error) {
	switch policy := Policy(text); policy {
	case "":
		return Fail, nil
	case Fail, KeepUpper, TakeLayers:
		return policy, nil
	}
	return "", fmt.Errorf("%w: unknown value %.64q; the values are %s, %s and %s",
		errdefs.ErrInvalidArgument, text, Fail, KeepUpper, TakeLayers)
}

// Conflict is an entry that both sides changed.
type Conflict struct {
	// Path is where the view of the uppers has or had it, relative to its root. Of one of more than 4095 bytes it is the end, after "…".
	Path string
	// Upper is what the uppers did to what the old layers have, and Layers what the new layers did. A directory that is gone below, or is
	// something else, is deleted there, or changed.
	Upper, Layers diff.Kind
}

// String returns the conflict in one line.
func (c Conflict) String() string {
	words := map[diff.Kind]string{diff.Added: "added", diff.Changed: "changed", diff.Deleted: "deleted"}
	return fmt.Sprintf("%s (%s, and %s by the new layers)", quote(c.Path), words[c.Upper], words[c.Layers])
}

const (
	// maxReported is how many conflicts a report has, and maxQuoted how many bytes of a path are in a text.
	maxReported = 5
	maxQuoted   = 200
)

// Report is what a record and an event say about conflicts.
type Report struct {
	Policy Policy `json:"onConflict"`
	// Conflicts is their number, and First are the first ones.
	Conflicts int64    `json:"conflicts,omitempty"`
	First     []string `json:"first,omitempty"`
}

// Add adds a conflict.
func (r *Report) Add(c Conflict) {
	if r.Conflicts++; len(r.First) < maxReported {
		r.First = append(r.First, c.String())
	}
}

// String returns the number of conflicts and the first ones.
func (r *Report) String() string {
	text := fmt.Sprintf("%d conflicts: %s", r.Conflicts, strings.Join(r.First, ", "))
	if r.Conflicts == 1 {
		text = "1 conflict: " + r.First[0]
	}
	if int64(len(r.First)) < r.Conflicts {
		text += ", …"
	}
	return text
}

// quote returns a path in quotes, and of a long one its end.
func quote(path string) string {
	if len(path) > maxQuoted {
		return fmt.Sprintf("…%q", path[len(path)-maxQuoted:])
	}
	return fmt.Sprintf("%q", path)
}
