package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// TestBadPublish changes one thing in a good request: the answer is the code that the CSI specification asks for, it
// says what to do, and nothing is left.
func TestBadPublish(t *testing.T) {
	node := startNode(t, "--pod-volume-wait=10ms")
	if _, err := node.Layer("good", map[string]string{"f": "f", "dir/f": "f"}); err != nil {
		t.Fatal(err)
	}
	must(t, os.Symlink("/etc", filepath.Join(node.LayerDir, "absolute-link")))
	must(t, unix.Mkfifo(filepath.Join(node.LayerDir, "fifo"), 0o600))
	must(t, os.Symlink("../data", filepath.Join(node.LayerDir, "up-link")))
	must(t, os.Symlink("/proc/self/root", filepath.Join(node.LayerDir, "magic-link")))
	must(t, os.Symlink("good", filepath.Join(node.LayerDir, "fine-link")))
	attribute := func(key, value string) func(*csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) { r.VolumeContext[key] = value }
	}
	layers := func(value string) func(*csi.NodePublishVolumeRequest) { return attribute("layers", value) }
	id := func(id string) func(*csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) { r.VolumeId = id }
	}
	target := func(path string) func(*csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) { r.TargetPath = path }
	}
	many := make([]string, 501)
	for i := range many {
		many[i] = fmt.Sprint("dir://layers/", i)
	}
	for name, c := range map[string]struct {
		change func(*csi.NodePublishVolumeRequest)
		code   codes.Code
		words  []string
	}{
		"unknown key": {attribute("layer", "x"), codes.InvalidArgument, []string{`"layer"`, "layers", "upper", "sizeLimit"}},
		"no layers":   {layers(" \n,, "), codes.InvalidArgument, []string{"no layers"}},
		"key layers is missing": {func(r *csi.NodePublishVolumeRequest) { delete(r.VolumeContext, "layers") }, codes.InvalidArgument,
			[]string{"no layers"}},
		"no scheme":             {layers("/etc"), codes.InvalidArgument, []string{"scheme", "dir://"}},
		"unknown scheme":        {layers("http://x/y"), codes.InvalidArgument, []string{`"http"`}},
		"no root name":          {layers("dir:///etc"), codes.InvalidArgument, []string{"invalid name"}},
		"bad escape":            {layers("dir://layers/%zz"), codes.InvalidArgument, []string{"%25"}},
		"NUL in a path":         {layers("dir://layers/a%00b"), codes.InvalidArgument, []string{"NUL"}},
		"unknown root":          {layers("dir://nowhere/x"), codes.InvalidArgument, []string{`"nowhere"`, "--layer-root: layers"}},
		"missing directory":     {layers("dir://layers/missing"), codes.NotFound, []string{"missing", "no directory"}},
		"a file":                {layers("dir://layers/good/f"), codes.InvalidArgument, []string{"file"}},
		"dot dot":               {layers("dir://layers/good/../good"), codes.InvalidArgument, []string{"beneath"}},
		"escaped dot dot":       {layers("dir://layers/%2e%2e/data"), codes.InvalidArgument, []string{"beneath"}},
		"absolute path":         {layers("dir://layers//etc"), codes.InvalidArgument, []string{"beneath"}},
		"absolute link":         {layers("dir://layers/absolute-link"), codes.InvalidArgument, []string{"leaves"}},
		"link upwards":          {layers("dir://layers/up-link"), codes.InvalidArgument, []string{"leaves"}},
		"magic link":            {layers("dir://layers/magic-link/etc"), codes.InvalidArgument, []string{"leaves"}},
		"a layer twice":         {layers("dir://layers/good,dir://layers/good/"), codes.InvalidArgument, []string{"twice"}},
		"the same by a link":    {layers("dir://layers/good,dir://layers/fine-link"), codes.InvalidArgument, []string{"twice"}},
		"a layer in a layer":    {layers("dir://layers/good,dir://layers/good/dir"), codes.InvalidArgument, []string{"inside"}},
		"501 layers":            {layers(strings.Join(many, ",")), codes.InvalidArgument, []string{"501", "500"}},
		"a name too long":       {layers("dir://layers/" + strings.Repeat("x", 300)), codes.InvalidArgument, []string{"too long"}},
		"no such registry":      {layers("oci://registry.invalid/team/data:1"), codes.Unavailable, []string{"registry.invalid", "team/data:1"}},
		"no such archive":       {layers("archive://layers/image.tar"), codes.NotFound, []string{"image.tar"}},
		"archive nowhere":       {layers("archive://nowhere/image.tar"), codes.InvalidArgument, []string{"nowhere", "--layer-root"}},
		"archive in a device":   {layers("archive://layers/fifo"), codes.InvalidArgument, []string{"neither a file nor a directory"}},
		"archive by a link":     {layers("archive://layers/absolute-link"), codes.InvalidArgument, []string{"leaves"}},
		"size that is none":     {attribute("sizeLimit", "much"), codes.InvalidArgument, []string{"sizeLimit", "500Mi"}},
		"size of zero":          {attribute("sizeLimit", "0"), codes.InvalidArgument, []string{"sizeLimit", "must be positive"}},
		"negative size":         {attribute("sizeLimit", "-1Gi"), codes.InvalidArgument, []string{"sizeLimit", "must be positive"}},
		"tiny size":             {attribute("sizeLimit", "1Ki"), codes.InvalidArgument, []string{"sizeLimit", "minimum"}},
		"size beyond numbers":   {attribute("sizeLimit", "100E"), codes.InvalidArgument, []string{"sizeLimit", "maximum"}},
		"size beyond the disk":  {attribute("sizeLimit", "7E"), codes.ResourceExhausted, []string{"test-node"}},
		"memory without a size": {attribute("medium", "memory"), codes.InvalidArgument, []string{"medium", "sizeLimit"}},
		"unknown enforcement": {attribute("sizeEnforcement", "strict"), codes.InvalidArgument,
			[]string{"sizeEnforcement", "quota", "image", "none"}},
		"image without a size": {attribute("sizeEnforcement", "image"), codes.InvalidArgument, []string{"sizeEnforcement", "sizeLimit"}},
		"owner that is none":   {attribute("layerOwner", "app"), codes.InvalidArgument, []string{"layerOwner", "uid:gid"}},
		"owner out of range":   {attribute("layerOwner", "1000:4294967295"), codes.InvalidArgument, []string{"layerOwner", "4294967294"}},
		"negative owner":       {attribute("layerOwner", "-1:0"), codes.InvalidArgument, []string{"layerOwner"}},
		"unknown ownership":    {attribute("ownership", "copy"), codes.InvalidArgument, []string{"ownership", "idmap", "chown"}},
		"unknown medium":       {attribute("medium", "tape"), codes.InvalidArgument, []string{"tape", "disk"}},
		"unknown upper":        {attribute("upper", "yes"), codes.InvalidArgument, []string{"yes", "volume://"}},
		"inline upper: claim":  {attribute("upper", "claim"), codes.InvalidArgument, []string{"inline"}},
		"upper path upwards":   {attribute("upper", "volume://x/../y"), codes.InvalidArgument, []string{"beneath"}},
		"upper volume missing": {attribute("upper", "volume://missing"), codes.Unavailable, []string{"missing"}},

		"no volume ID":        {id(""), codes.InvalidArgument, []string{"volume ID"}},
		"slash in volume ID":  {id("a/b"), codes.InvalidArgument, []string{"volume ID", "'/'"}},
		"dot dot as ID":       {id(".."), codes.InvalidArgument, []string{"volume ID"}},
		"NUL in volume ID":    {id("a\x00b"), codes.InvalidArgument, []string{"volume ID"}},
		"volume ID of 4 KiB":  {id(strings.Repeat("x", 4096)), codes.InvalidArgument, []string{"4096", "128"}},
		"no target":           {target(""), codes.InvalidArgument, []string{"target"}},
		"relative target":     {target("pods/x"), codes.InvalidArgument, []string{"absolute"}},
		"target with dot dot": {target("/tmp/../etc"), codes.InvalidArgument, []string{"absolute"}},
		"target's parent":     {target(node.KubeletDir + "/pods/gone/volumes/x/mount"), codes.FailedPrecondition, []string{"kubelet"}},

		"no capability": {func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = nil }, codes.InvalidArgument, []string{"capability"}},
		"block": {func(r *csi.NodePublishVolumeRequest) {
			r.VolumeCapability.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
		}, codes.InvalidArgument, []string{"Filesystem"}},
		"fsType": {func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().FsType = "ext4" }, codes.InvalidArgument,
			[]string{"fsType"}},
		"access mode": {func(r *csi.NodePublishVolumeRequest) {
			r.VolumeCapability.AccessMode.Mode = csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER
		}, codes.InvalidArgument, []string{"ReadWriteOnce"}},
		"RWX without upper: pod": {func(r *csi.NodePublishVolumeRequest) {
			r.VolumeContext["csi.storage.k8s.io/ephemeral"] = "false"
			r.VolumeCapability.AccessMode.Mode = readWriteMany
		}, codes.InvalidArgument, []string{"upper: pod"}},
		"RWX with upper: claim": {func(r *csi.NodePublishVolumeRequest) {
			r.VolumeContext["csi.storage.k8s.io/ephemeral"] = "false"
			r.VolumeContext["upper"] = "claim"
			r.VolumeCapability.AccessMode.Mode = readWriteMany
		}, codes.InvalidArgument, []string{"one node"}},
	} {
		t.Run(name, func(t *testing.T) {
			pod := newPod(t, node, "pod")
			request := pod.Request(inline("layers", drivertest.Layers("good")))
			must(t, os.MkdirAll(filepath.Dir(request.TargetPath), 0o755))
			c.change(request)
			_, err := node.NodeService().NodePublishVolume(timeout(t), request)
			wantCode(t, err, c.code, c.words...)
			wantNothingLeft(t, node)
			wantAbsent(t, pod.Target("v"))
		})
	}
}

func TestTargetThatIsNotForUs(t *testing.T) {
	node := startNode(t)
	v := inline("layers", layersOf(t, node, map[string]string{"f": "f"}))
	for name, c := range map[string]struct {
		make  func(t *testing.T, target string)
		code  codes.Code
		words string
	}{
		"file": {func(t *testing.T, target string) { write(t, target, "mine") }, codes.InvalidArgument, "file"},
		"link": {func(t *testing.T, target string) { must(t, os.Symlink("/tmp", target)) }, codes.InvalidArgument, "link"},
		"mounted by another one": {func(t *testing.T, target string) { must(t, os.Mkdir(target, 0o755)); mountTmpfs(t, target) },
			codes.FailedPrecondition, "not this volume"},
	} {
		t.Run(name, func(t *testing.T) {
			pod := newPod(t, node, "pod")
			target := pod.Target(v.Name)
			must(t, os.MkdirAll(filepath.Dir(target), 0o755))
			c.make(t, target)
			before, err := os.Lstat(target)
			must(t, err)
			_, err = pod.Publish(timeout(t), v)
			wantCode(t, err, c.code, c.words)
			after, err := os.Lstat(target)
			must(t, err)
			if !os.SameFile(before, after) {
				t.Error("the driver put another thing in its place")
			}
			wantCode(t, pod.Unpublish(timeout(t), v), codes.FailedPrecondition)
			must(t, unmountAll(target))
			must(t, os.Remove(target))
			wantNothingLeft(t, node)
		})
	}
}

func unmountAll(path string) error {
	if err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW); err != nil && !isErrno(err, unix.EINVAL) {
		return err
	}
	return nil
}

func TestPublishedAgainWithSomethingElse(t *testing.T) {
	node := startNode(t)
	layersOf(t, node, map[string]string{"f": "0"}, map[string]string{"f": "1"})
	pod := newPod(t, node, "pod")
	for _, v := range []drivertest.Volume{inline("layers", drivertest.Layers("layer-0")),
		claim("kept", readWriteOnce, "layers", drivertest.Layers("layer-0"))} {
		publish(t, pod, v)
		for name, change := range map[string]func(*drivertest.Volume){
			"other layers": func(v *drivertest.Volume) { v.Attributes = pairs([]string{"layers", drivertest.Layers("layer-1")}) },
			"other upper": func(v *drivertest.Volume) {
				v.Attributes = pairs([]string{"layers", drivertest.Layers("layer-0"), "upper", "none"})
			},
			"read-only":     func(v *drivertest.Volume) { v.ReadOnly = true },
			"other options": func(v *drivertest.Volume) { v.Options = []string{"noexec"} },
		} {
			t.Run(v.Name+" with "+name, func(t *testing.T) {
				other := v
				change(&other)
				_, err := pod.Publish(timeout(t), other)
				wantCode(t, err, codes.AlreadyExists)
				wantFile(t, filepath.Join(pod.Target(v.Name), "f"), "0")
			})
		}
		unpublish(t, pod, v)
	}
	// The upper that is kept stays on its layers when nobody has it, too.
	other := claim("kept", readWriteOnce, "layers", drivertest.Layers("layer-1"))
	_, err := pod.Publish(timeout(t), other)
	wantCode(t, err, codes.AlreadyExists, "layers that it was made on")
}

func TestLayerInTheDataRoot(t *testing.T) {
	node := newNode(t, "--layer-root-allow-submounts=everything")
	node.AddArgs("--layer-root=everything="+node.Dir, "--layer-root=alias="+filepath.Join(node.Dir, "alias"))
	must(t, os.MkdirAll(filepath.Join(node.Dir, "alias"), 0o755))
	must(t, os.MkdirAll(node.DataRoot, 0o755))
	must(t, unix.Mount(node.Dir, filepath.Join(node.Dir, "alias"), "", unix.MS_BIND, ""))
	start(t, node)
	v := inline("layers", layersOf(t, node, map[string]string{"f": "f"}))
	other := newPod(t, node, "other")
	publish(t, other, v)
	must(t, os.Symlink("data/volumes", filepath.Join(node.Dir, "link")))
	victim := strings.TrimPrefix(upperDir(node, other, v), node.DataRoot+"/")
	// What another pod wrote is no archive either.
	write(t, filepath.Join(node.DataRoot, victim, "evil.tar"), strings.Repeat("x", 1024))
	for _, ref := range []string{
		"archive://everything/data/" + victim + "/evil.tar", "archive://everything/data/" + victim,
		"archive://alias/data/" + victim + "/evil.tar",
		"dir://everything", "dir://everything/data", "dir://everything/data/" + victim, "dir://everything/link",
		"dir://alias", "dir://alias/data/" + victim, "dir://alias/link",
	} {
		_, err := newPod(t, node, "pod").Publish(timeout(t), inline("layers", ref))
		wantCode(t, err, codes.InvalidArgument, "data root")
	}
	unpublish(t, other, v)
	wantNothingLeft(t, node)
}

func TestLayerRootInTheDataRootStopsTheDriver(t *testing.T) {
	node := newNode(t)
	node.AddArgs("--layer-root=inside=" + filepath.Join(node.DataRoot, "volumes"))
	if err := node.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "is in the data root") {
		t.Errorf("started: %v", err)
	}
	node.Forget()
}

func TestBadController(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "f"}, map[string]string{"f": "f"})
	create := func(change func(*csi.CreateVolumeRequest)) error {
		request := &csi.CreateVolumeRequest{
			Name:               "name",
			Parameters:         map[string]string{"layers": layers, "csi.storage.k8s.io/pvc/name": "added by the provisioner"},
			VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(readWriteOnce)},
		}
		change(request)
		_, err := node.Controller().CreateVolume(timeout(t), request)
		return err
	}
	for name, c := range map[string]struct {
		change func(*csi.CreateVolumeRequest)
		code   codes.Code
		words  string
	}{
		"no name":           {func(r *csi.CreateVolumeRequest) { r.Name = "" }, codes.InvalidArgument, "name"},
		"no capability":     {func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = nil }, codes.InvalidArgument, "capabilities"},
		"unknown key":       {func(r *csi.CreateVolumeRequest) { r.Parameters["size"] = "1" }, codes.InvalidArgument, "the keys are"},
		"missing directory": {func(r *csi.CreateVolumeRequest) { r.Parameters["layers"] = "dir://layers/missing" }, codes.NotFound, "missing"},
		"unknown root": {func(r *csi.CreateVolumeRequest) {
			r.Parameters["layers"] = "dir://nowhere/x"
			r.Parameters["upper"] = "pod"
		}, codes.InvalidArgument, "nowhere"},
		"negative size": {func(r *csi.CreateVolumeRequest) { r.CapacityRange = &csi.CapacityRange{RequiredBytes: -1} }, codes.InvalidArgument,
			"capacity"},
		"too large": {func(r *csi.CreateVolumeRequest) { r.CapacityRange = &csi.CapacityRange{RequiredBytes: 1 << 60} },
			codes.ResourceExhausted, "disk of"},
		"other node": {func(r *csi.CreateVolumeRequest) {
			elsewhere := map[string]string{drivertest.DriverName + "/node": "elsewhere"}
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: elsewhere}}}
		}, codes.ResourceExhausted, "do not include this node"},
		"snapshot": {func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = &csi.VolumeContentSource{} }, codes.InvalidArgument, "snapshot"},
		"RWX": {func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0].AccessMode.Mode = readWriteMany }, codes.InvalidArgument,
			"upper: pod"},
		"RWO and ROX": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = append(r.VolumeCapabilities, drivertest.Capability(readOnlyMany))
		}, codes.InvalidArgument, "one access mode"},
	} {
		t.Run(name, func(t *testing.T) {
			wantCode(t, create(c.change), c.code, c.words)
			wantNothingLeft(t, node)
		})
	}
	must(t, create(func(*csi.CreateVolumeRequest) {}))
	wantCode(t, create(func(r *csi.CreateVolumeRequest) { r.Parameters["layers"] = drivertest.Layers("layer-1") }), codes.AlreadyExists,
		"other layers")
	wantCode(t, create(func(r *csi.CreateVolumeRequest) { r.CapacityRange = &csi.CapacityRange{RequiredBytes: 1 << 20} }),
		codes.AlreadyExists, "0 bytes")
	for _, id := range []string{"", "a/b", "..", "a\x00"} {
		_, err := node.Controller().DeleteVolume(timeout(t), &csi.DeleteVolumeRequest{VolumeId: id})
		wantCode(t, err, codes.InvalidArgument, "volume ID")
	}
	_, err := node.Controller().ValidateVolumeCapabilities(timeout(t), &csi.ValidateVolumeCapabilitiesRequest{VolumeId: "missing",
		VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(readWriteOnce)}})
	wantCode(t, err, codes.NotFound)
	_, err = node.Controller().ListVolumes(timeout(t), &csi.ListVolumesRequest{StartingToken: "x"})
	wantCode(t, err, codes.Aborted)
	_, err = node.NodeService().NodeGetVolumeStats(timeout(t), &csi.NodeGetVolumeStatsRequest{VolumeId: "name", VolumePath: "/tmp"})
	wantCode(t, err, codes.NotFound)
}
