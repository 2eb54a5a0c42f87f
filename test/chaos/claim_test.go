package chaos

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// createVolume has the driver make a claim's volume.
func (w *world) createVolume() {
	// Of this walk alone: the driver looks for the loop device of an image by the names of the image and its directory, and asks devices
	// of that name, which another walk may have on a disk that has failed.
	name := w.name("claim-" + filepath.Base(w.node.Dir))
	from := pick(w, w.sources...)
	attributes := pick(w,
		map[string]string{},
		map[string]string{"upper": "pod"},
		map[string]string{"sizeEnforcement": "none"},
		map[string]string{"sizeEnforcement": "image"},
		map[string]string{"ownership": "chown"},
		map[string]string{"sizeEnforcement": "none", "upper": "pod"},
		map[string]string{"upper": "pod", "medium": "memory"},
	)
	attributes = maps.Clone(attributes)
	attributes["layers"] = from.layers
	w.tell("create %s: %v", name, attributes)
	c := &claim{origin: origin{parameters: attributes, layers: from.files, secrets: from.secrets, size: 16 << 20}}
	if attributes["upper"] != "pod" {
		c.upper = newUpper(c.layers)
	}
	if w.create(name, c, nil, func(error) bool { return false }) {
		w.claims = append(w.claims, c)
	}
}

// create has the driver make a volume, which begins with a source unless that is nil. It reports whether there is one: the driver may
// have refused it, or a fault may have stood in the way.
func (w *world) create(name string, c *claim, source *csi.VolumeContentSource, mayRefuse func(error) bool) bool {
	w.t.Helper()
	mode := csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	if c.upper == nil {
		mode = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	}
	var created atomic.Pointer[csi.Volume]
	refused, err := w.mayRefuse("CreateVolume", mayRefuse, func(ctx context.Context) error {
		response, err := w.node.Controller().CreateVolume(ctx, &csi.CreateVolumeRequest{
			Name:                name,
			Parameters:          c.parameters,
			VolumeCapabilities:  []*csi.VolumeCapability{drivertest.Capability(mode)},
			CapacityRange:       &csi.CapacityRange{RequiredBytes: c.size},
			VolumeContentSource: source,
		})
		if err == nil {
			created.Store(response.GetVolume())
		}
		return err
	})
	if err != nil || refused != nil {
		// The provisioner deletes what it gave up on.
		remove := func(ctx context.Context) error {
			_, err := w.node.Controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: name})
			return err
		}
		if w.call("DeleteVolume", remove) != nil {
			w.mend()
			w.mustCall("DeleteVolume", remove)
		}
		return false
	}
	v := created.Load()
	c.Volume = drivertest.Volume{
		Name: name, ID: v.GetVolumeId(), Claim: true, Mode: mode, Attributes: v.GetVolumeContext(), Secrets: c.secrets,
	}
	return true
}

// unused returns a claim that no pod has, or nil.
func (w *world) unused() *claim {
	free := slices.DeleteFunc(slices.Clone(w.claims), func(c *claim) bool {
		return slices.ContainsFunc(w.pods, func(p *pod) bool {
			return slices.ContainsFunc(p.views, func(v *view) bool { return v.claim == c })
		})
	})
	if len(free) == 0 {
		return nil
	}
	return pick(w, free...)
}

// deleteVolume deletes a claim's volume.
func (w *world) deleteVolume() {
	c := w.unused()
	if c == nil || w.fault != noFault {
		return
	}
	w.tell("delete %s", c.Name)
	w.delete(c)
}

func (w *world) delete(c *claim) {
	w.t.Helper()
	w.mustCall("DeleteVolume", func(ctx context.Context) error {
		_, err := w.node.Controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: c.ID})
		return err
	})
	w.claims = slices.DeleteFunc(w.claims, func(other *claim) bool { return other == c })
}

// expand has a claim grow that a pod has, as kubelet does.
func (w *world) expand() {
	p, v := w.published()
	if v == nil || v.claim == nil || w.fault != noFault {
		return
	}
	c := v.claim
	isImage := c.Attributes["sizeEnforcement"] == "image" || c.Attributes["sizeEnforcement"] == "" && c.Attributes["medium"] == ""
	if isImage && drivertest.LacksResource() {
		return // ext4 asks whoever has it grow for CAP_SYS_RESOURCE.
	}
	c.size += 4 << 20
	w.tell("expand %s to %d", c.Name, c.size)
	w.mustCall(expandVolume, func(ctx context.Context) error {
		_, err := w.node.NodeService().NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: c.ID, VolumePath: p.Target(v.Name),
			CapacityRange: &csi.CapacityRange{RequiredBytes: c.size}})
		return err
	})
	w.checkView(p, v)
}

// overfill writes into a volume with a size until that refuses, and removes what it has written.
func (w *world) overfill() {
	p, v := w.published()
	if v == nil || v.limit() == 0 || w.fault != noFault {
		return
	}
	w.tell("overfill %s of %s", v.Name, p.Name)
	big := filepath.Join(p.Target(v.Name), "big")
	file, err := os.Create(big)
	must(w.t, err)
	var written int64
	for err == nil && written <= v.limit() {
		var n int
		n, err = file.Write(make([]byte, 64<<10))
		written += int64(n)
	}
	if written > v.limit() || !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		w.fatalf("%d bytes went into %d: %v", written, v.limit(), err)
	}
	must(w.t, errors.Join(file.Close(), os.Remove(big), syncTo(p.Target(v.Name), ".")))
	w.checkView(p, v)
}

// loseUpper removes the upper of a claim. Its next publish must miss it, and must not begin with an empty one.
func (w *world) loseUpper() {
	c := w.unused()
	if c == nil || !c.made || w.fault != noFault {
		return
	}
	w.tell("lose the upper of %s", c.Name)
	dir := filepath.Join(w.node.DataRoot, "volumes", c.ID)
	for _, name := range []string{"upper", "data", "disk.img"} {
		must(w.t, os.RemoveAll(filepath.Join(dir, name)))
	}
	p, err := w.node.NewPod(w.name("pod"))
	must(w.t, err)
	w.total.rpcs++
	if _, err := p.Publish(w.t.Context(), c.Volume); status.Code(err) != codes.DataLoss {
		w.fatalf("answered with %v", err)
	}
	w.mustCall("NodeUnpublishVolume", func(ctx context.Context) error { return p.Unpublish(ctx, c.Volume) })
	must(w.t, p.Remove())
	w.delete(c)
}
