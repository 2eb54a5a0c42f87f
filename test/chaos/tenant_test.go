package chaos

import (
	"context"
	"os"
	"path/filepath"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// private is what the names of images begin with that the registry gives to nobody without a login.
const private = "private/"

// login returns the secret of a volume with a password.
func (w *world) login(password string) map[string]string {
	return map[string]string{".dockerconfigjson": w.registry.DockerConfig("tenant", password)}
}

// intrude has a pod ask for the image of a tenant, which may be on the node or not. It has no login, or a wrong one.
func (w *world) intrude() {
	if w.fault != noFault && registryFaults[w.fault] == nil {
		return
	}
	i := slices.IndexFunc(w.sources, func(s source) bool { return s.secrets != nil })
	v := drivertest.Volume{Name: "stolen", Attributes: map[string]string{"layers": w.sources[i].layers},
		Secrets: pick(w, nil, w.login("wrong"))}
	p, err := w.node.NewPod(w.name("thief"))
	must(w.t, err)
	w.tell("%s asks for the image of a tenant", p.Name)
	err = w.once(func(ctx context.Context) error { _, err := p.Publish(ctx, v); return err })
	if code := status.Code(err); code != codes.Unauthenticated && !slices.Contains(transient, code) {
		w.fatalf("answered with %s: %v", code, err)
	}
	if _, err := os.Lstat(filepath.Join(p.Target(v.Name), "secret")); err == nil {
		w.fatalf("the thief has it")
	}
	w.mustCall("NodeUnpublishVolume", func(ctx context.Context) error { return p.Unpublish(ctx, v) })
	must(w.t, p.Remove())
}

// deleteInUse has the provisioner delete a claim that a pod has, which must be refused and change nothing, and asks for the capacity
// that is left beside it.
func (w *world) deleteInUse() {
	p, v := w.published()
	if v == nil || v.claim == nil || w.fault != noFault {
		return
	}
	w.tell("delete %s of %s in use", v.Name, p.Name)
	err := w.once(func(ctx context.Context) error {
		_, err := w.node.Controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.ID})
		return err
	})
	if code := status.Code(err); code != codes.FailedPrecondition && !slices.Contains(transient, code) {
		w.fatalf("answered with %s: %v", code, err)
	}
	must(w.t, w.once(func(ctx context.Context) error {
		response, err := w.node.Controller().GetCapacity(ctx, &csi.GetCapacityRequest{})
		if available := response.GetAvailableCapacity(); err == nil && (available < 0 || available > diskSize) {
			w.fatalf("%d bytes are available on a disk of %d", available, diskSize)
		}
		return err
	}))
	w.checkView(p, v)
}
