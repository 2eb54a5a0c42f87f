package reference_test

import (
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// A reference is written in several ways, and has one canonical form.
func ExampleParse() {
	for _, text := range []string{
		"dir://models/llama/7b/",
		"dir://models/a%2Cb",
		"archive://images/rootfs.tar.zst",
		"volume://data",
		"oci://debian",
		"oci://registry.example:5000/team/data:1?path=/usr/share",
		"oci://debian:12?platform=linux/arm64",
	} {
		ref, err := reference.Parse(text)
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Printf("%s %q %q\n\t%s\n", ref.Scheme(), ref.Name(), ref.Path(), ref)
	}
	// Output:
	// dir "models" "llama/7b"
	// 	dir://models/llama/7b
	// dir "models" "a,b"
	// 	dir://models/a%2Cb
	// archive "images" "rootfs.tar.zst"
	// 	archive://images/rootfs.tar.zst
	// volume "data" ""
	// 	volume://data
	// oci "docker.io/library/debian:latest" ""
	// 	oci://docker.io/library/debian:latest
	// oci "registry.example:5000/team/data:1" "usr/share"
	// 	oci://registry.example:5000/team/data:1?path=%2Fusr%2Fshare
	// oci "docker.io/library/debian:12" ""
	// 	oci://docker.io/library/debian:12?platform=linux%2Farm64
}

// A path cannot leave its layer root, and a name is not a path.
func ExampleParse_refused() {
	for _, text := range []string{"dir://models/../secrets", "dir:///etc", "/etc", "oci://debian?platform=arm64"} {
		_, err := reference.Parse(text)
		fmt.Println(text, errdefs.IsInvalidArgument(err))
	}
	// Output:
	// dir://models/../secrets true
	// dir:///etc true
	// /etc true
	// oci://debian?platform=arm64 true
}

// The topmost layer comes first.
func ExampleParseList() {
	layers, err := reference.ParseList(`
		dir://patches/today,
		oci://registry.example/team/app:2
		oci://debian:12`)
	if err != nil {
		fmt.Println(err)
		return
	}
	for i, layer := range layers {
		fmt.Println(i, layer)
	}
	// Output:
	// 0 dir://patches/today
	// 1 oci://registry.example/team/app:2
	// 2 oci://docker.io/library/debian:12
}
