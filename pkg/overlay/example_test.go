package overlay_test

import (
	"log"
	"os"

	mount "k8s.io/mount-utils"
	"k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
)

// Mount two layers and an upper at /mnt/view. This needs root.
func ExampleMounter_Overlay() {
	const work = "/var/lib/example/mounter"
	if err := os.MkdirAll(work, 0o700); err != nil {
		log.Fatal(err)
	}
	features, err := overlay.Probe(work)
	if err != nil {
		log.Fatal(err)
	}
	mounter, err := overlay.NewMounter(overlay.Config{
		Dir: work, Features: features, MountUtils: mount.NewWithoutSystemd(""), Commands: exec.New(),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer mounter.Close()

	open := func(path string) *os.File {
		dir, err := linux.OpenDir(path)
		if err != nil {
			log.Fatal(err)
		}
		return dir
	}
	spec := overlay.Spec{
		// The topmost layer comes first, as in the option lowerdir.
		Lowers:     []*os.File{open("/srv/layers/app"), open("/srv/layers/base")},
		Upper:      open("/var/lib/example/upper"),
		Work:       open("/var/lib/example/work"),
		Attributes: overlay.Attributes{NoSUID: true, NoDev: true},
	}
	if err := mounter.Overlay(spec, open("/mnt/view")); err != nil {
		log.Fatal(err)
	}
	// Files of the layers are seen in /mnt/view; what is written there is in /var/lib/example/upper.
}
