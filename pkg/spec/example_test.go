package spec_test

import (
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// The keys of an inline volume, from a pod's volumeAttributes.
func ExampleParse() {
	parsed, err := spec.Parse(map[string]string{
		spec.KeyLayers:     "dir://patches/today, oci://debian:12",
		spec.KeySizeLimit:  "1Gi",
		spec.KeyLayerOwner: "1000:2000",
	}, spec.Scope{Inline: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("layers:", parsed.LayerNames())
	fmt.Println("upper:", parsed.Upper)
	fmt.Println("size:", parsed.Size)
	fmt.Println("owner:", parsed.LayerOwner.UID, parsed.LayerOwner.GID)
	// Output:
	// layers: [dir://patches/today oci://docker.io/library/debian:12]
	// upper: pod
	// size: 1073741824
	// owner: 1000 2000
}

// The default upper depends on where the keys are and on the access mode.
func ExampleParse_defaults() {
	keys := map[string]string{spec.KeyLayers: "dir://models"}
	for _, scope := range []spec.Scope{
		{Inline: true},
		{Access: spec.ReadWriteOnce},
		{Access: spec.ReadOnlyMany},
		{Access: spec.ReadWriteMany},
	} {
		parsed, err := spec.Parse(keys, scope)
		if errdefs.IsInvalidArgument(err) {
			parsed.Upper = "must be given"
		}
		fmt.Printf("inline %t, access %q: upper %s\n", scope.Inline, scope.Access, parsed.Upper)
	}
	// Output:
	// inline true, access "": upper pod
	// inline false, access "ReadWriteOnce": upper claim
	// inline false, access "ReadOnlyMany": upper none
	// inline false, access "ReadWriteMany": upper must be given
}

// A spec has the same keys again, with the references in their canonical form.
func ExampleSpec_Parameters() {
	parsed, err := spec.Parse(map[string]string{
		spec.KeyLayers: "oci://debian:12",
		spec.KeyUpper:  "volume://data/upper",
	}, spec.Scope{Inline: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	parameters := parsed.Parameters()
	for _, key := range slices.Sorted(maps.Keys(parameters)) {
		fmt.Printf("%s: %s\n", key, parameters[key])
	}
	// Output:
	// layers: oci://docker.io/library/debian:12
	// upper: volume://data/upper
}
