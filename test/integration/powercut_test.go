package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// TestClaimSurvivesAPowerCut cuts the power as far as a file can: the data root is copied as its disk has it at that
// moment, mounted anew, and has all that was synced.
func TestClaimSurvivesAPowerCut(t *testing.T) {
	for _, c := range []struct{ system, limit, kept string }{
		{"ext4", "none", "directory"},
		{"ext4", "image", "disk-image"},
		{"btrfs with quota", "", "btrfs-qgroup"},
		{"ext4 with project quota", "quota", "project-quota"},
		{"xfs with project quota", "quota", "project-quota"},
	} {
		t.Run(c.kept+" on "+c.system, func(t *testing.T) { cutPower(t, c.system, c.limit, c.kept) })
	}
}

func cutPower(t *testing.T, system, limit, kept string) {
	node := newNode(t)
	disk := node.DataRoot + ".img"
	mountImage(t, system, 512<<20, node.DataRoot, "")
	start(t, node)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	attributes := []string{"layers", layers}
	if limit != "" {
		attributes = append(attributes, "sizeEnforcement", limit)
	}
	v := createSized(t, node, "kept", readWriteOnce, 32<<20, attributes...)
	wantKept(t, node, v, kept)
	pod := newPod(t, node, "pod")
	target := publish(t, pod, v)
	for n := range 20 {
		path := filepath.Join(target, fmt.Sprint("synced-", n))
		write(t, path, strings.Repeat("s", 1000*n))
		file, err := os.Open(path)
		must(t, err)
		must(t, errors.Join(file.Sync(), file.Close()))
		write(t, filepath.Join(target, fmt.Sprint("lost-", n)), "perhaps")
	}
	after := newNode(t)
	// What no sync has reached is in the page cache of the file system, and not in its image.
	runProgram(t, "cp", "--sparse=always", disk, after.DataRoot+".img")
	unpublish(t, pod, v)
	must(t, node.Stop())
	// Not two of one UUID at a time: btrfs and xfs refuse that.
	must(t, unix.Unmount(node.DataRoot, 0))

	mountExisting(t, system, after.DataRoot+".img", after.DataRoot)
	must(t, os.RemoveAll(after.LayerDir))
	must(t, os.CopyFS(after.LayerDir, os.DirFS(node.LayerDir)))
	start(t, after)
	pod = newPod(t, after, "pod")
	target = publish(t, pod, v)
	for n := range 20 {
		wantFile(t, filepath.Join(target, fmt.Sprint("synced-", n)), strings.Repeat("s", 1000*n))
	}
	write(t, filepath.Join(target, "new"), "x")
	if written := writeUntilFull(t, filepath.Join(target, "big")); written > 32<<20 && limit != "none" {
		t.Errorf("%d bytes went into 32 MiB after the power cut", written)
	}
	unpublish(t, pod, v)
	deleteVolume(t, after, v)
}

// wantKept checks how the driver keeps a volume's upper.
func wantKept(t *testing.T, node *drivertest.Node, v drivertest.Volume, kept string) {
	t.Helper()
	description, err := node.Admin().Volume(timeout(t), v.ID)
	must(t, err)
	if description.Backend != kept {
		t.Errorf("volume %s has the backend %s, want %s", v.ID, description.Backend, kept)
	}
}

func runProgram(t *testing.T, name string, args ...string) {
	t.Helper()
	output, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, output)
	}
}

// TestUpperThatIsRecordedIsOnTheDisk cuts the power right after a claim's first publish. A record of an upper that had not reached the
// disk would have the claim be refused as lost.
func TestUpperThatIsRecordedIsOnTheDisk(t *testing.T) {
	for _, system := range []string{"ext4", "xfs"} {
		for _, enforcement := range []string{"none", "image"} {
			t.Run(enforcement+" on "+system, func(t *testing.T) {
				node := newNode(t)
				mountImage(t, system, 512<<20, node.DataRoot, "")
				start(t, node)
				v := createSized(t, node, "kept", readWriteOnce, 32<<20,
					"layers", layersOf(t, node, map[string]string{"f": "f"}), "sizeEnforcement", enforcement)
				publish(t, newPod(t, node, "pod"), v)
				must(t, drivertest.ShutDown(node.DataRoot))
				must(t, errors.Join(node.Kill(), drivertest.UnmountBeneath(node.KubeletDir), unix.Unmount(node.DataRoot, 0)))
				mountExisting(t, system, node.DataRoot+".img", node.DataRoot)
				must(t, node.Reboot())
				start(t, node)
				pod := newPod(t, node, "later")
				wantFile(t, filepath.Join(publish(t, pod, v), "f"), "f")
				unpublish(t, pod, v)
				deleteVolume(t, node, v)
			})
		}
	}
}

// TestEphemeralRecordThatDidNotReachTheDisk: it is not synced. After a power cut it is empty, or on ext4 has zeroes, and the volume begins
// with an empty upper.
func TestEphemeralRecordThatDidNotReachTheDisk(t *testing.T) {
	for name, content := range map[string][]byte{"empty": nil, "zeroes": make([]byte, 700)} {
		t.Run(name, func(t *testing.T) {
			node := startNode(t)
			layers := layersOf(t, node, map[string]string{"f": "layer"})
			pod := newPod(t, node, "pod")
			_, err := pod.EmptyDir("scratch")
			must(t, err)
			volumes := map[string]drivertest.Volume{
				"directory": inline("layers", layers),
				"read-only": inline("layers", layers, "upper", "none"),
				"image":     inline("layers", layers, "sizeLimit", "16Mi", "sizeEnforcement", "image"),
				"memory":    inline("layers", layers, "sizeLimit", "16Mi", "medium", "memory"),
				"scratch":   inline("layers", layers, "upper", "volume://scratch/up"),
				"each pod":  create(t, node, "each", readWriteMany, "layers", layers, "upper", "pod"),
			}
			for kind, v := range volumes {
				if !v.Claim {
					v.Name = strings.ReplaceAll(kind, " ", "-")
				}
				volumes[kind] = v
				publish(t, pod, v)
			}
			must(t, node.Reboot())
			for _, v := range volumes {
				must(t, os.WriteFile(filepath.Join(node.DataRoot, "volumes", pod.Request(v).GetVolumeId(), "volume.json"), content, 0o600))
			}
			start(t, node)
			for kind, v := range volumes {
				wantFile(t, filepath.Join(publish(t, pod, v), "f"), "layer")
				if kind != "read-only" {
					write(t, filepath.Join(pod.Target(v.Name), "f"), "written")
				}
				unpublish(t, pod, v)
			}
			deleteVolume(t, node, volumes["each pod"])
		})
	}
}
