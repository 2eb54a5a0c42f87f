package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// story is the demo, a chapter a method. Each checks what it shows.
type story struct {
	node *drivertest.Node
	out  *printer

	pod, other             *drivertest.Pod
	target, upper          string
	volume                 drivertest.Volume
	base, datasets, tuning string
}

func (s *story) layers(context.Context) error {
	s.out.chapter("Three layers on the node, each a read-only directory. The upper ones shadow the lower ones.")
	var err error
	for _, layer := range []struct {
		path  *string
		name  string
		files map[string]string
	}{
		{&s.tuning, "tuning", map[string]string{"config.yaml": "learning_rate: 0.001   # from tuning\n"}},
		{&s.datasets, "datasets", map[string]string{
			"config.yaml": "learning_rate: 0.01    # from datasets\n", "data/train.csv": "1,2,3\n", "data/old.csv": "0,0,0\n",
		}},
		{&s.base, "base", map[string]string{
			"config.yaml": "learning_rate: 0.1     # from base\n", "bin/train": "#!/bin/sh\n", "README": "the base layer\n",
		}},
	} {
		if *layer.path, err = s.node.Layer(layer.name, layer.files); err != nil {
			return err
		}
		s.out.tree(layer.name, *layer.path)
	}
	return nil
}

func (s *story) publish(ctx context.Context) error {
	s.out.chapter("Pod \"trainer\" names them in an inline volume. Kubelet calls NodePublishVolume.")
	s.volume = drivertest.Volume{Name: "work", Attributes: map[string]string{"layers": drivertest.Layers("tuning", "datasets", "base")}}
	var err error
	if s.pod, err = s.node.NewPod("trainer"); err != nil {
		return err
	}
	begin := time.Now()
	if s.target, err = s.pod.Publish(ctx, s.volume); err != nil {
		return err
	}
	took := time.Since(begin)
	options, err := drivertest.Options(s.target)
	if err != nil {
		return err
	}
	lowers := s.out.mount(options)
	s.upper = option(options, "upperdir=")
	s.out.tree("what the pod sees", s.target)
	s.out.note("published in %.2f ms, over the CSI socket", float64(took.Microseconds())/1000)
	return errors.Join(
		check(slices.Equal(lowers, []string{s.tuning, s.datasets, s.base}), "the kernel's lowerdirs are %q", lowers),
		content(filepath.Join(s.target, "config.yaml"), "learning_rate: 0.001   # from tuning\n"),
		content(filepath.Join(s.target, "data/train.csv"), "1,2,3\n"),
		content(filepath.Join(s.target, "README"), "the base layer\n"),
	)
}

func (s *story) copyUp(context.Context) error {
	s.out.chapter("The pod appends to a file of a layer. The kernel copies that file up, once; the layer stays as it is.")
	s.out.command("echo 4,5,6 >> data/train.csv")
	file, err := os.OpenFile(filepath.Join(s.target, "data/train.csv"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString("4,5,6\n")
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	s.out.tree("upper", s.upper)
	s.out.file("in the view", filepath.Join(s.target, "data/train.csv"))
	s.out.file("in the layer", filepath.Join(s.datasets, "data/train.csv"))
	return errors.Join(
		content(filepath.Join(s.target, "data/train.csv"), "1,2,3\n4,5,6\n"),
		content(filepath.Join(s.upper, "data/train.csv"), "1,2,3\n4,5,6\n"),
		content(filepath.Join(s.datasets, "data/train.csv"), "1,2,3\n"),
	)
}

func (s *story) whiteout(context.Context) error {
	s.out.chapter("The pod deletes a file of a layer. The upper gets a whiteout, a character device 0/0; the layer keeps its file.")
	s.out.command("rm data/old.csv")
	if err := os.Remove(filepath.Join(s.target, "data/old.csv")); err != nil {
		return err
	}
	s.out.tree("upper", s.upper)
	s.out.tree("what the pod sees", s.target)
	var stat unix.Stat_t
	if err := unix.Lstat(filepath.Join(s.upper, "data/old.csv"), &stat); err != nil {
		return err
	}
	return errors.Join(
		check(
			stat.Mode&unix.S_IFMT == unix.S_IFCHR && stat.Rdev == 0,
			"the upper has mode %o, device %d instead of a whiteout",
			stat.Mode,
			stat.Rdev,
		),
		absent(filepath.Join(s.target, "data/old.csv")),
		content(filepath.Join(s.datasets, "data/old.csv"), "0,0,0\n"),
	)
}

func (s *story) neighbour(ctx context.Context) error {
	s.out.chapter("Pod \"evaluator\" has the same layers beside it. Neither sees what the other one writes.")
	var err error
	if s.other, err = s.node.NewPod("evaluator"); err != nil {
		return err
	}
	target, err := s.other.Publish(ctx, s.volume)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(target, "scores.txt"), []byte("0.97\n"), 0o644); err != nil {
		return err
	}
	s.out.tree("what trainer sees", s.target)
	s.out.tree("what evaluator sees", target)
	return errors.Join(
		absent(filepath.Join(s.target, "scores.txt")),
		content(filepath.Join(target, "data/old.csv"), "0,0,0\n"),
		content(filepath.Join(target, "data/train.csv"), "1,2,3\n"),
	)
}

func (s *story) claim(ctx context.Context) error {
	s.out.chapter("A claim: its upper is kept on the node. One pod writes, is deleted, and the next one finds it all.")
	created, err := s.node.Controller().CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name:               "pvc-demo",
		Parameters:         s.volume.Attributes,
		VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)},
	})
	if err != nil {
		return err
	}
	claim := drivertest.Volume{
		Name:       "pvc-demo",
		ID:         created.GetVolume().GetVolumeId(),
		Claim:      true,
		Attributes: created.GetVolume().GetVolumeContext(),
	}
	for _, turn := range []struct{ pod, writes, finds string }{
		{pod: "database-0", writes: "INSERT 1\n"},
		{pod: "database-1", writes: "INSERT 2\n", finds: "INSERT 1\n"},
	} {
		if err := s.claimTurn(ctx, claim, turn.pod, turn.writes, turn.finds); err != nil {
			return err
		}
	}
	_, err = s.node.Controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: claim.ID})
	s.out.note("DeleteVolume: the upper is moved to the trash, and deleted in the background")
	return errors.Join(err, absent(filepath.Join(s.node.DataRoot, "volumes", claim.ID)))
}

func (s *story) claimTurn(ctx context.Context, claim drivertest.Volume, name, writes, finds string) error {
	pod, err := s.node.NewPod(name)
	if err != nil {
		return err
	}
	target, err := pod.Publish(ctx, claim)
	if err != nil {
		return err
	}
	journal := filepath.Join(target, "journal")
	found, err := os.ReadFile(journal)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.WriteFile(journal, append(found, writes...), 0o644); err != nil {
		return err
	}
	options, err := drivertest.Options(target)
	if err != nil {
		return err
	}
	if finds == "" {
		s.out.field("upperdir", option(options, "upperdir="))
	}
	s.out.file(name+" leaves", journal)
	return errors.Join(
		check(string(found) == finds, "pod %s found %q in the claim, and not %q", name, found, finds),
		pod.Unpublish(ctx, claim),
		pod.Remove(),
	)
}

func (s *story) cleanUp(ctx context.Context) error {
	s.out.chapter("The pods end. Kubelet calls NodeUnpublishVolume, and nothing is left but the layers.")
	for _, pod := range []*drivertest.Pod{s.pod, s.other} {
		begin := time.Now()
		if err := pod.Unpublish(ctx, s.volume); err != nil {
			return err
		}
		s.out.note("%s unpublished in %.2f ms", pod.Name, float64(time.Since(begin).Microseconds())/1000)
		if err := pod.Remove(); err != nil {
			return err
		}
	}
	left, err := s.node.Leftovers()
	if err != nil {
		return err
	}
	s.out.tree("datasets, as on the first day", s.datasets)
	return errors.Join(
		check(len(left) == 0, "left behind: %q", left),
		content(filepath.Join(s.datasets, "data/train.csv"), "1,2,3\n"),
		content(filepath.Join(s.datasets, "data/old.csv"), "0,0,0\n"),
	)
}

// option is the value of the first option that begins so.
func option(options []string, prefix string) string {
	for _, o := range options {
		if value, ok := strings.CutPrefix(o, prefix); ok {
			return value
		}
	}
	return ""
}

func check(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}

func content(path, want string) error {
	got, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return check(string(got) == want, "%s has %q, and not %q", path, got, want)
}

func absent(path string) error {
	_, err := os.Lstat(path)
	return check(errors.Is(err, fs.ErrNotExist), "%s is there (%v)", path, err)
}
