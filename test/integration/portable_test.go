package integration

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
	"github.com/overlay-csi/overlay-csi/test/registrytest/distribution"
)

// portableTest has two nodes, and a registry that wants a login.
type portableTest struct {
	*testing.T
	r    *registrytest.Registry
	a, b *drivertest.Node
}

var portableBase = []map[string]string{
	{"f": "layer", "gone": "layer", "d/g": "layer", "d/h": "layer", "again/below": "layer", "attributes/f": "layer"},
	{"d/g": "upper layer", "linked": "layer", "deep/a/b/c": "layer"},
}

func newPortableTest(t *testing.T) *portableTest {
	a, b := startNode(t), newNode(t)
	r := startRegistry(t, a, registrytest.Options{User: "u", Password: pushPassword, Handler: distribution.New(t.Context(), true)})
	must(t, r.Configure(b.CertsDir()))
	start(t, b)
	pushImage(t, r, "team/base:1", portableBase...)
	return &portableTest{t, r, a, b}
}

// login returns secrets with a password for the registry.
func (p *portableTest) login(password string) map[string]string {
	return map[string]string{".dockerconfigjson": p.r.DockerConfig("u", password)}
}

// create makes a claim on layers, or from a snapshot, on a node.
func (p *portableTest) create(node *drivertest.Node, name, layers string, size int64, snapshot string) (drivertest.Volume, error) {
	request := createRequest(name, readWriteOnce, size, "layers", layers, "sizeEnforcement", "none")
	request.Secrets = p.login(pushPassword)
	if snapshot != "" {
		request.VolumeContentSource = ofSnapshot(snapshot)
	}
	response, err := node.Controller().CreateVolume(timeout(p.T), request)
	v := response.GetVolume()
	return drivertest.Volume{
		Name: name, ID: v.GetVolumeId(), Claim: true, Mode: readWriteOnce, Attributes: v.GetVolumeContext(), Secrets: request.GetSecrets(),
	}, err
}

func (p *portableTest) mustCreate(node *drivertest.Node, name, layers, snapshot string) drivertest.Volume {
	p.Helper()
	v, err := p.create(node, name, layers, snapshotSize, snapshot)
	must(p.T, err)
	return v
}

// in calls do in a view of a volume, and returns what the view has then.
func (p *portableTest) in(node *drivertest.Node, v drivertest.Volume, do func(target string)) map[string]string {
	p.Helper()
	pod := newPod(p.T, node, "of-"+v.Name)
	target := publish(p.T, pod, v)
	do(target)
	entries := entriesOf(p.T, target)
	unpublish(p.T, pod, v)
	removePod(p.T, pod)
	return entries
}

// call calls CreateSnapshot once.
func (p *portableTest) call(node *drivertest.Node, name string, v drivertest.Volume, password string) (*csi.Snapshot, error) {
	response, err := node.Controller().CreateSnapshot(timeout(p.T), &csi.CreateSnapshotRequest{
		Name: name, SourceVolumeId: v.ID, Parameters: map[string]string{"push": p.r.Host + "/team/snapshots"}, Secrets: p.login(password),
	})
	return response.GetSnapshot(), err
}

// push has a snapshot pushed, as external-snapshotter does: it repeats the request until the snapshot is ready.
func (p *portableTest) push(node *drivertest.Node, name string, v drivertest.Volume) string {
	p.Helper()
	var handle string
	eventually(p.T, "snapshot "+name+" is in the registry", func() bool {
		s, err := p.call(node, name, v, pushPassword)
		must(p.T, err)
		if handle != "" && s.GetSnapshotId() != handle {
			p.Fatalf("the handle was %s, and is %s", handle, s.GetSnapshotId())
		}
		handle = s.GetSnapshotId()
		if s.GetSourceVolumeId() != v.ID || s.GetSizeBytes() != snapshotSize || len(s.GetAccessibleTopology()) > 0 {
			p.Fatalf("the snapshot is %v", s)
		}
		return s.GetReadyToUse()
	})
	return handle
}

// pushError repeats a request until it says why the last push failed.
func (p *portableTest) pushError(name string, v drivertest.Volume, password string) error {
	p.Helper()
	var err error
	eventually(p.T, "the error of the push", func() bool {
		var s *csi.Snapshot
		s, err = p.call(p.a, name, v, password)
		if s.GetReadyToUse() {
			p.Fatal("the snapshot is ready")
		}
		return err != nil
	})
	return err
}

func (p *portableTest) delete(node *drivertest.Node, handle, password string) error {
	_, err := node.Controller().DeleteSnapshot(timeout(p.T), &csi.DeleteSnapshotRequest{SnapshotId: handle, Secrets: p.login(password)})
	return err
}

// TestPortableSnapshot keeps what was written to a claim in a registry, deletes the claim, and restores it on another node.
func TestPortableSnapshot(t *testing.T) {
	p := newPortableTest(t)
	files := map[string]string{}
	for _, layer := range portableBase {
		for name, content := range layer {
			files[name] = content
		}
	}
	for _, node := range []*drivertest.Node{p.a, p.b} {
		dir, err := node.Layer("base", files)
		must(t, err)
		// The same layer on both nodes.
		for name := range files {
			must(t, os.Chtimes(filepath.Join(dir, name), time.Unix(1_600_000_000, 0), time.Unix(1_600_000_000, 0)))
		}
	}
	for kind, layers := range map[string]string{"image": "oci://" + p.r.Host + "/team/base:1", "directory": "dir://layers/base"} {
		t.Run(kind, func(t *testing.T) {
			p := &portableTest{t, p.r, p.a, p.b}
			v := p.mustCreate(p.a, "claim-"+kind, layers, "")
			want := p.in(p.a, v, func(target string) { writeOddities(t, target) })
			handle := p.push(p.a, "snapshot-"+kind, v)
			wantFrozen(t, p.a, 1) // That of the volume.
			_, err := p.a.Controller().DeleteVolume(timeout(t), &csi.DeleteVolumeRequest{VolumeId: v.ID})
			must(t, err)
			eventually(t, "the frozen upper is discarded", func() bool { return countFrozen(t, p.a) == 0 })

			restored := p.mustCreate(p.b, "restored-"+kind, layers, handle)
			wantEntries(t, p.in(p.b, restored, func(string) {}), want)
			if again := p.mustCreate(p.b, "restored-"+kind, layers, handle); again.ID != restored.ID {
				t.Errorf("a repeated request made %s, and not %s", again.ID, restored.ID)
			}
			// A snapshot of what was restored, on the first node again.
			want = p.in(p.b, restored, func(target string) { write(t, filepath.Join(target, "more"), kind) })
			second := p.push(p.b, "second-"+kind, restored)
			wantEntries(t, p.in(p.a, p.mustCreate(p.a, "third-"+kind, layers, second), func(string) {}), want)
			p.wantListed(p.a, second, restored)
			// An operator may name the image with its digest in a VolumeSnapshotContent.
			third := p.mustCreate(p.a, "fourth-"+kind, layers, second)
			self, _, _ := strings.Cut(third.Attributes["layers"], "\n")
			byDigest := "push:" + strings.TrimPrefix(self, "oci://")
			wantEntries(t, p.in(p.b, p.mustCreate(p.b, "static-"+kind, layers, byDigest), func(string) {}), want)

			p.wantRefusedRestores(layers, second)
			p.wantDeleted(handle, layers)
			wantEntries(t, p.in(p.b, restored, func(string) {}), want)
		})
	}
	if log := p.a.Log() + p.b.Log(); strings.Contains(log, pushPassword) {
		t.Error("the password is in a log")
	}
}

func countFrozen(t *testing.T, node *drivertest.Node) int {
	t.Helper()
	frozen, err := os.ReadDir(filepath.Join(node.DataRoot, "frozen"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return len(frozen)
}

func wantFrozen(t *testing.T, node *drivertest.Node, want int) {
	t.Helper()
	if got := countFrozen(t, node); got != want {
		t.Errorf("there are %d frozen uppers, and not %d", got, want)
	}
}

// wantListed gets and lists a snapshot that the node has no record of.
func (p *portableTest) wantListed(node *drivertest.Node, handle string, of drivertest.Volume) {
	p.Helper()
	secrets := p.login(pushPassword)
	got, err := node.Controller().GetSnapshot(timeout(p.T), &csi.GetSnapshotRequest{SnapshotId: handle, Secrets: secrets})
	must(p.T, err)
	list, err := node.Controller().ListSnapshots(timeout(p.T), &csi.ListSnapshotsRequest{SnapshotId: handle, Secrets: secrets})
	must(p.T, err)
	if s := got.GetSnapshot(); !s.GetReadyToUse() || s.GetSourceVolumeId() != of.ID || s.GetSizeBytes() != snapshotSize ||
		len(list.GetEntries()) != 1 || list.GetEntries()[0].GetSnapshot().GetSnapshotId() != handle {
		p.Errorf("got %v, and the list %v", s, list)
	}
	_, err = node.Controller().GetSnapshot(timeout(p.T), &csi.GetSnapshotRequest{SnapshotId: handle + "0", Secrets: secrets})
	wantCode(p.T, err, codes.NotFound, p.r.Host)
}

// wantRefusedRestores asks for volumes that a snapshot cannot become.
func (p *portableTest) wantRefusedRestores(layers, handle string) {
	p.Helper()
	_, err := p.create(p.b, "small", layers, snapshotSize/2, handle)
	wantCode(p.T, err, codes.OutOfRange, fmt.Sprint(snapshotSize))
	_, err = p.create(p.b, "other", layersOf(p.T, p.b, map[string]string{"other": "layer"}), snapshotSize, handle)
	wantCode(p.T, err, codes.InvalidArgument, "request the same ones")
	_, err = p.create(p.b, "none", layers, snapshotSize, "push:"+p.r.Host+"/team/base:1")
	wantCode(p.T, err, codes.InvalidArgument, "no snapshot of this driver")
}

// wantDeleted deletes a snapshot, which the registry then has no more.
func (p *portableTest) wantDeleted(handle, layers string) {
	p.Helper()
	wantCode(p.T, p.delete(p.a, handle, "wrong"), codes.Unauthenticated, p.r.Host, "may delete", `user "u"`)
	isDelete := func(w http.ResponseWriter, request *http.Request) bool {
		if request.Method == http.MethodDelete {
			http.Error(w, `{"errors":[{"code":"UNSUPPORTED"}]}`, http.StatusMethodNotAllowed)
		}
		return request.Method == http.MethodDelete
	}
	// A registry that deletes nothing: the snapshot is there, and the node has no record of it any more.
	p.r.SetFault(isDelete)
	must(p.T, p.delete(p.a, handle, pushPassword))
	p.r.SetFault(nil)
	p.mustCreate(p.a, "undeleted-"+p.Name()[len("TestPortableSnapshot/"):], layers, handle)
	for _, node := range []*drivertest.Node{p.b, p.a} {
		must(p.T, p.delete(node, handle, pushPassword))
	}
	_, err := p.create(p.b, "late", layers, snapshotSize, handle)
	wantCode(p.T, err, codes.NotFound, "registry "+p.r.Host)
	must(p.T, p.delete(p.b, "push:"+p.r.Host+"/team/snapshots:none", pushPassword))
}

// TestPortableSnapshotFaults has pushes fail, be interrupted and be asked for in wrong ways.
func TestPortableSnapshotFaults(t *testing.T) {
	p := newPortableTest(t)
	layers := "oci://" + p.r.Host + "/team/base:1"
	v := p.mustCreate(p.a, "claim", layers, "")
	want := p.in(p.a, v, func(target string) { writeOddities(t, target) })

	p.wantRefusedRequests(v)
	wantCode(t, p.pushError("snapshot", v, "wrong"), codes.Unavailable, "registry "+p.r.Host, `user "u"`)
	base := func(w http.ResponseWriter, request *http.Request) bool {
		isBase := strings.HasPrefix(request.URL.Path, "/v2/team/base/manifests/")
		if isBase {
			http.Error(w, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`, http.StatusNotFound)
		}
		return isBase
	}
	p.r.SetFault(base)
	var err error
	eventually(t, "the error says that the image below is gone", func() bool {
		err = p.pushError("snapshot", v, pushPassword)
		return strings.Contains(err.Error(), "gone from its registry")
	})
	wantCode(t, err, codes.Unavailable, p.r.Host+"/team/base")
	p.r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
		http.Error(w, "overloaded", http.StatusServiceUnavailable)
		return true
	})
	eventually(t, "the error is that of the registry", func() bool {
		err = p.pushError("snapshot", v, pushPassword)
		return strings.Contains(err.Error(), "503")
	})
	wantCode(t, err, codes.Unavailable, "registry "+p.r.Host)

	// The registry does not go on, and requests are answered all the same. The driver is killed then.
	arrived, held := make(chan struct{}, 1000), make(chan struct{})
	p.r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if request.Method == http.MethodPut && strings.Contains(request.URL.Path, "/blobs/uploads/") {
			arrived <- struct{}{}
			<-held
		}
		return false
	})
	eventually(t, "the push begins", func() bool {
		s, _ := p.call(p.a, "snapshot", v, pushPassword)
		return s != nil && !s.GetReadyToUse()
	})
	<-arrived
	s, err := p.call(p.a, "snapshot", v, pushPassword)
	if err != nil || s.GetReadyToUse() {
		t.Errorf("while it is pushed: %v, %v", s, err)
	}
	must(t, p.a.Kill())
	close(held)
	p.r.SetFault(nil)
	start(t, p.a)
	var twins [4]string
	must(t, atOnce(len(twins), func(i int) error {
		s, err := p.call(p.a, "snapshot", v, pushPassword)
		twins[i] = s.GetSnapshotId()
		return err
	}))
	handle := p.push(p.a, "snapshot", v)
	for _, twin := range twins {
		if twin != handle {
			t.Errorf("a request at the same time got %s, and not %s", twin, handle)
		}
	}
	wantEntries(t, p.in(p.b, p.mustCreate(p.b, "restored", layers, handle), func(string) {}), want)
	// A snapshot that is being pushed can be deleted.
	release := make(chan struct{})
	p.r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if request.Method == http.MethodPut {
			select {
			case <-release:
			case <-request.Context().Done():
			}
		}
		return false
	})
	p.in(p.a, v, func(target string) { write(t, filepath.Join(target, "later"), "pod") })
	begun, err := p.call(p.a, "deleted", v, pushPassword)
	must(t, err)
	must(t, p.delete(p.a, begun.GetSnapshotId(), pushPassword))
	close(release)
	p.r.SetFault(nil)
	must(t, p.delete(p.a, handle, pushPassword))
	_, err = p.a.Controller().DeleteVolume(timeout(t), &csi.DeleteVolumeRequest{VolumeId: v.ID})
	must(t, err)
	wantNothingFrozen(t, p.a)
}

// wantRefusedRequests asks for snapshots that there cannot be.
func (p *portableTest) wantRefusedRequests(v drivertest.Volume) {
	p.Helper()
	create := func(parameters, secrets map[string]string) error {
		_, err := p.a.Controller().CreateSnapshot(context.Background(), &csi.CreateSnapshotRequest{
			Name: "refused", SourceVolumeId: v.ID, Parameters: parameters, Secrets: secrets,
		})
		return err
	}
	to := p.r.Host + "/team/snapshots"
	for _, c := range []struct {
		parameters map[string]string
		secrets    map[string]string
		words      []string
	}{
		{parameters: map[string]string{"push": to, "pull": to}, words: []string{`unknown key "pull"`}},
		{parameters: map[string]string{"push": ""}, words: []string{`key "push"`}},
		{parameters: map[string]string{"push": to + ":tag"}, words: []string{"a tag of its own"}},
		{parameters: map[string]string{"push": "Registry/UPPER"}, words: []string{`key "push"`}},
		{parameters: map[string]string{"push": to + strings.Repeat("s", 100)}, words: []string{"too long"}},
		{map[string]string{"push": to}, map[string]string{"user": "u"}, []string{".dockerconfigjson"}},
	} {
		wantCode(p.T, create(c.parameters, c.secrets), codes.InvalidArgument, c.words...)
	}
	wantFrozen(p.T, p.a, 0)
	// Without a secret the registry refuses the push.
	var err error
	eventually(p.T, "the error of a push without a login", func() bool {
		err = create(map[string]string{"push": to}, nil)
		return err != nil
	})
	wantCode(p.T, err, codes.Unavailable, "registry "+p.r.Host, "without credentials")
	wantCode(p.T, create(map[string]string{"push": to + "2"}, nil), codes.AlreadyExists, to)
	handle, err := p.call(p.a, "refused", v, pushPassword)
	if err == nil {
		must(p.T, p.delete(p.a, handle.GetSnapshotId(), pushPassword))
		return
	}
	wantCode(p.T, err, codes.Unavailable, p.r.Host)
	list, err := p.a.Controller().ListSnapshots(timeout(p.T), &csi.ListSnapshotsRequest{})
	must(p.T, err)
	for _, entry := range list.GetEntries() {
		must(p.T, p.delete(p.a, entry.GetSnapshot().GetSnapshotId(), pushPassword))
	}
}
