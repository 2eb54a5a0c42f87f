package volume

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// TestCreateWithResolvedLayers: a volume keeps what the tags meant when it was created, and is compared by the layers as requested.
func TestCreateWithResolvedLayers(t *testing.T) {
	n := newFakeNode(t)
	n.fail["resolve tags"] = errForced
	resolved := func(text string) []reference.Reference {
		list, err := reference.ParseList(text)
		check(t, err)
		return list
	}
	const image, other = "oci://registry.example.com/model:latest", "oci://registry.example.com/other:latest"
	digest := func(digit string) string {
		text := "oci://registry.example.com/model@sha256:"
		for range 64 {
			text += digit
		}
		return text
	}
	create := func(requested, digest string) (Volume, error) {
		return n.manager.Create(t.Context(), CreateRequest{
			Name: "v", Spec: parsed(t, rwo, spec.KeyLayers, requested), Access: rwo.Access, Resolved: resolved(digest),
		})
	}
	for _, moved := range []string{"a", "b"} {
		created, err := create(image, digest(moved))
		check(t, err)
		if want := resolved(digest("a")); !slices.Equal(created.Spec.Layers, want) {
			t.Errorf("the volume has %v; want %v", created.Spec.Layers, want)
		}
	}
	if _, err := create(other, digest("a")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a volume of other layers: %v", err)
	}
}
