package driver

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

const (
	nodeWriter       = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	nodeMultiWriter  = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	nodeSingleWriter = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	nodeReader       = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	manyReaders      = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	manyWriters      = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	manyOneWriter    = csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER
)

// capability returns the capability of a volume that is mounted with these options.
func capability(mode csi.VolumeCapability_AccessMode_Mode, options ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{MountFlags: options}},
	}
}

// goodPublish returns a request that publishRequest takes: that of a pod with an inline volume.
func goodPublish() *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{
		VolumeId:         "csi-1",
		TargetPath:       "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/view/mount",
		VolumeCapability: capability(nodeWriter),
		VolumeContext: map[string]string{
			spec.KeyLayers:  "dir://models/a",
			keyEphemeral:    "true",
			keyPodUID:       "uid",
			keyPodName:      "pod",
			keyPodNamespace: "namespace",
		},
	}
}

// goodCreate returns a request that createRequest takes.
func goodCreate() *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name:               "pvc-1",
		VolumeCapabilities: []*csi.VolumeCapability{capability(nodeWriter)},
		Parameters:         map[string]string{spec.KeyLayers: "dir://models/a", keyClaimName: "claim", keyClaimNamespace: "namespace"},
	}
}

// wantStatus fails the test unless err becomes a status with this code and this word in its message.
func wantStatus(t *testing.T, err error, code codes.Code, word string) {
	t.Helper()
	got := status.Convert(toStatus(err))
	if got.Code() != code || !strings.Contains(got.Message(), word) {
		t.Errorf("%s %q; want %s with %q", got.Code(), got.Message(), code, word)
	}
}

func TestPublishRequest(t *testing.T) {
	t.Run("inline", func(t *testing.T) {
		req := goodPublish()
		req.Secrets = map[string]string{".dockerconfigjson": "{}"}
		got, err := publishRequest(req, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got.VolumeID != req.GetVolumeId() || got.Target != req.GetTargetPath() || !maps.Equal(got.Secrets, req.GetSecrets()) {
			t.Errorf("%+v does not have the request's ID, target and secrets", got)
		}
		if !got.Inline || got.Provisioned || got.Group != nil || got.Access != spec.ReadWriteOnce || got.Spec.Upper != spec.UpperPod {
			t.Errorf("%+v is not the request of an inline volume", got)
		}
		if want := (kubelet.Pod{UID: "uid", Namespace: "namespace", Name: "pod"}); got.Pod != want {
			t.Errorf("pod %+v; want %+v", got.Pod, want)
		}
		if !got.Attributes.NoSUID || !got.Attributes.NoDev || got.Attributes.ReadOnly {
			t.Errorf("attributes %+v; want nosuid, nodev and writable", got.Attributes)
		}
	})
	t.Run("claim", func(t *testing.T) {
		req := goodPublish()
		delete(req.VolumeContext, keyEphemeral)
		req.VolumeContext[keyProvisioner] = "provisioner"
		req.GetVolumeCapability().GetMount().VolumeMountGroup = "2000"
		got, err := publishRequest(req, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got.Inline || !got.Provisioned || got.Spec.Upper != spec.UpperClaim {
			t.Errorf("%+v is not the request of a provisioned claim", got)
		}
		if got.Group == nil || *got.Group != 2000 {
			t.Errorf("group %v; want 2000", got.Group)
		}
	})
	t.Run("allowed mount option", func(t *testing.T) {
		req := goodPublish()
		req.VolumeCapability = capability(nodeWriter, "suid")
		if got, err := publishRequest(req, []string{"suid"}); err != nil || got.Attributes.NoSUID {
			t.Errorf("attributes %+v, %v; want them without nosuid", got.Attributes, err)
		}
	})
	for name, mutate := range map[string]func(*csi.NodePublishVolumeRequest){
		"readonly":   func(r *csi.NodePublishVolumeRequest) { r.Readonly = true },
		"option ro":  func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = capability(nodeWriter, "ro") },
		"upper none": func(r *csi.NodePublishVolumeRequest) { r.VolumeContext[spec.KeyUpper] = "none" },
	} {
		t.Run("read-only by "+name, func(t *testing.T) {
			req := goodPublish()
			mutate(req)
			if got, err := publishRequest(req, nil); err != nil || !got.Attributes.ReadOnly {
				t.Errorf("attributes %+v, %v; want them read-only", got.Attributes, err)
			}
		})
	}
}

func TestPublishRequestRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		mutate func(*csi.NodePublishVolumeRequest)
		word   string
	}{
		"no ID":           {func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "" }, "volume ID is missing"},
		"ID with a slash": {func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "../x" }, "volumeHandle"},
		"no target":       {func(r *csi.NodePublishVolumeRequest) { r.TargetPath = "" }, "target path is missing"},
		"relative target": {func(r *csi.NodePublishVolumeRequest) { r.TargetPath = "mount" }, "not absolute"},
		"no capability":   {func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = nil }, "capability is missing"},
		"unknown option":  {func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = capability(nodeWriter, "sync") }, `"sync"`},
		"option suid": {func(r *csi.NodePublishVolumeRequest) {
			r.VolumeCapability = capability(nodeWriter, "suid")
		}, "--allow-mount-option=suid"},
		"ephemeral maybe":  {func(r *csi.NodePublishVolumeRequest) { r.VolumeContext[keyEphemeral] = "maybe" }, "maybe"},
		"no layers":        {func(r *csi.NodePublishVolumeRequest) { delete(r.VolumeContext, spec.KeyLayers) }, "no layers"},
		"unknown key":      {func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["layer"] = "x" }, `unknown key "layer"`},
		"inline and claim": {func(r *csi.NodePublishVolumeRequest) { r.VolumeContext[spec.KeyUpper] = "claim" }, "inline"},
		"layers from":      {func(r *csi.NodePublishVolumeRequest) { r.VolumeContext[spec.KeyLayersFrom] = "claim" }, "StorageClasses only"},
		"group": {func(r *csi.NodePublishVolumeRequest) {
			r.GetVolumeCapability().GetMount().VolumeMountGroup = "staff"
		}, "staff"},
	} {
		t.Run(name, func(t *testing.T) {
			req := goodPublish()
			c.mutate(req)
			_, err := publishRequest(req, nil)
			wantStatus(t, err, codes.InvalidArgument, c.word)
		})
	}
}

func TestCreateRequest(t *testing.T) {
	for name, c := range map[string]struct {
		mutate func(*csi.CreateVolumeRequest)
		size   int64
		access spec.AccessMode
		upper  spec.Policy
	}{
		"plain": {
			mutate: func(*csi.CreateVolumeRequest) {},
			access: spec.ReadWriteOnce, upper: spec.UpperClaim,
		},
		"size": {
			mutate: func(r *csi.CreateVolumeRequest) {
				r.CapacityRange = &csi.CapacityRange{RequiredBytes: 1 << 30, LimitBytes: 2 << 30}
			},
			size: 1 << 30, access: spec.ReadWriteOnce, upper: spec.UpperClaim,
		},
		"size below the minimum": {
			mutate: func(r *csi.CreateVolumeRequest) { r.CapacityRange = &csi.CapacityRange{RequiredBytes: 1} },
			size:   spec.MinPersistentSize, access: spec.ReadWriteOnce, upper: spec.UpperClaim,
		},
		"limit alone": {
			mutate: func(r *csi.CreateVolumeRequest) { r.CapacityRange = &csi.CapacityRange{LimitBytes: 2 << 30} },
			size:   2 << 30, access: spec.ReadWriteOnce, upper: spec.UpperClaim,
		},
		"limit alone, of nothing": {
			mutate: func(r *csi.CreateVolumeRequest) {
				r.CapacityRange = &csi.CapacityRange{LimitBytes: 1}
				r.Parameters[spec.KeyUpper] = "none"
			},
			access: spec.ReadWriteOnce, upper: spec.UpperNone,
		},
		"size of nothing": {
			mutate: func(r *csi.CreateVolumeRequest) {
				r.CapacityRange = &csi.CapacityRange{RequiredBytes: 1 << 30}
				r.Parameters[spec.KeyUpper] = "none"
			},
			access: spec.ReadWriteOnce, upper: spec.UpperNone,
		},
		"two access modes": {
			mutate: func(r *csi.CreateVolumeRequest) {
				r.VolumeCapabilities = []*csi.VolumeCapability{capability(nodeWriter), capability(nodeSingleWriter)}
			},
			access: spec.ReadWriteOnce, upper: spec.UpperClaim,
		},
		"mount option for the operator to allow": {
			mutate: func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0] = capability(nodeWriter, "suid") },
			access: spec.ReadWriteOnce, upper: spec.UpperClaim,
		},
		"limit of a restored volume": {
			mutate: func(r *csi.CreateVolumeRequest) {
				r.CapacityRange, r.VolumeContentSource = &csi.CapacityRange{LimitBytes: 1 << 30}, sourceOf(volume.Source{Snapshot: "s"})
			},
			access: spec.ReadWriteOnce, upper: spec.UpperClaim,
		},
		"layers from the claim": {
			mutate: func(r *csi.CreateVolumeRequest) {
				delete(r.Parameters, spec.KeyLayers)
				r.Parameters[spec.KeyLayersFrom] = "claim"
			},
			access: spec.ReadWriteOnce, upper: spec.UpperClaim,
		},
	} {
		t.Run(name, func(t *testing.T) {
			req := goodCreate()
			c.mutate(req)
			got, err := createRequest(req)
			if err != nil {
				t.Fatal(err)
			}
			bounds := req.GetCapacityRange()
			if got.Name != req.GetName() || got.Required != bounds.GetRequiredBytes() || got.Limit != bounds.GetLimitBytes() {
				t.Errorf("%+v does not have the request's name and bounds", got)
			}
			if got.Spec.Size != c.size || got.Access != c.access || got.Spec.Upper != c.upper {
				t.Errorf("size %d, access %s, upper %s; want %d, %s, %s", got.Spec.Size, got.Access, got.Spec.Upper, c.size, c.access, c.upper)
			}
		})
	}
}

func TestCreateRequestRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		mutate func(*csi.CreateVolumeRequest)
		code   codes.Code
		word   string
	}{
		"no name": {func(r *csi.CreateVolumeRequest) {
			r.Name = ""
		}, codes.InvalidArgument, "volume name is missing"},
		"long name": {func(r *csi.CreateVolumeRequest) {
			r.Name = strings.Repeat("n", 129)
		}, codes.InvalidArgument, "maximum is 128"},
		"unknown source": {func(r *csi.CreateVolumeRequest) {
			r.VolumeContentSource = &csi.VolumeContentSource{}
		}, codes.InvalidArgument, "neither a snapshot nor a volume"},
		"snapshot without an ID": {func(r *csi.CreateVolumeRequest) {
			r.VolumeContentSource = sourceOf(volume.Source{})
			r.VolumeContentSource.Type = &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{}}
		}, codes.InvalidArgument, "snapshot ID is missing"},
		"volume without an ID": {func(r *csi.CreateVolumeRequest) {
			r.VolumeContentSource = sourceOf(volume.Source{})
		}, codes.InvalidArgument, "volume ID is missing"},
		"snapshot for each pod": {func(r *csi.CreateVolumeRequest) {
			r.VolumeContentSource, r.Parameters[spec.KeyUpper] = sourceOf(volume.Source{Snapshot: "s"}), "pod"
		}, codes.InvalidArgument, "made from snapshot s needs upper: claim"},
		"volume for readers": {func(r *csi.CreateVolumeRequest) {
			r.VolumeContentSource, r.VolumeCapabilities[0] = sourceOf(volume.Source{Volume: "v"}), capability(manyReaders)
		}, codes.InvalidArgument, "made from volume v needs upper: claim"},
		"no capabilities": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = nil
		}, codes.InvalidArgument, "capabilities are missing"},
		"sizeLimit": {func(r *csi.CreateVolumeRequest) {
			r.Parameters[spec.KeySizeLimit] = "1Gi"
		}, codes.InvalidArgument, "is its request"},
		"mutable parameters": {func(r *csi.CreateVolumeRequest) {
			r.MutableParameters = map[string]string{"iops": "1"}
		}, codes.InvalidArgument, "VolumeAttributesClass"},
		"negative size": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: -1}
		}, codes.InvalidArgument, "capacity"},
		"limit below the size": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: 2, LimitBytes: 1}
		}, codes.InvalidArgument, "capacity"},
		"limit below the minimum": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: 1, LimitBytes: 1}
		}, codes.OutOfRange, "8388608"},
		"limit alone, below the minimum": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{LimitBytes: 1}
		}, codes.OutOfRange, "8388608"},
		"memory of no size": {func(r *csi.CreateVolumeRequest) {
			r.Parameters[spec.KeyUpper], r.Parameters[spec.KeyMedium] = "pod", "memory"
		}, codes.InvalidArgument, "needs a size"},
		"access modes with different uppers": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = []*csi.VolumeCapability{capability(nodeWriter), capability(manyReaders)}
		}, codes.InvalidArgument, "different default uppers"},
		"unknown option": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0] = capability(nodeWriter, "sync")
		}, codes.InvalidArgument, `"sync"`},
	} {
		t.Run(name, func(t *testing.T) {
			req := goodCreate()
			c.mutate(req)
			_, err := createRequest(req)
			wantStatus(t, err, c.code, c.word)
		})
	}
}

func TestAccessMode(t *testing.T) {
	for mode, want := range map[csi.VolumeCapability_AccessMode_Mode]spec.AccessMode{
		nodeWriter:       spec.ReadWriteOnce,
		nodeMultiWriter:  spec.ReadWriteOnce,
		nodeSingleWriter: spec.ReadWriteOncePod,
		nodeReader:       spec.SingleNodeReaderOnly,
		manyReaders:      spec.ReadOnlyMany,
		manyWriters:      spec.ReadWriteMany,
	} {
		t.Run(mode.String(), func(t *testing.T) {
			if got, err := accessModeOf(capability(mode)); err != nil || got != want {
				t.Errorf("%q, %v; want %q", got, err, want)
			}
			if !slices.Contains(accessModeOrder, want) {
				t.Errorf("%s is not in accessModeOrder", want)
			}
		})
	}
	block := &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}}
	ext4 := capability(nodeWriter)
	ext4.GetMount().FsType = "ext4"
	for name, c := range map[string]struct {
		capability *csi.VolumeCapability
		word       string
	}{
		"nothing":                              {nil, "capability is missing"},
		"no access type":                       {&csi.VolumeCapability{}, "access type"},
		"block":                                {block, "volumeMode must be Filesystem"},
		"fsType":                               {ext4, `fsType "ext4"`},
		"no access mode":                       {capability(csi.VolumeCapability_AccessMode_UNKNOWN), "UNKNOWN"},
		"one writer and readers of many nodes": {capability(manyOneWriter), "use ReadWriteOnce, ReadWriteOncePod, ReadOnlyMany or ReadWriteMany"},
		"an access mode of a later CSI":        {capability(99), "99"},
		"fsType overlay, no access mode":       {&csi.VolumeCapability{AccessType: overlayType()}, "UNKNOWN"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := accessModeOf(c.capability)
			wantStatus(t, err, codes.InvalidArgument, c.word)
		})
	}
}

func overlayType() *csi.VolumeCapability_Mount {
	return &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "overlay"}}
}

func TestParsePage(t *testing.T) {
	for name, c := range map[string]struct {
		entries int32
		token   string
		after   string
		code    codes.Code
		word    string
	}{
		"first page":       {entries: 5},
		"next page":        {token: tokenPrefix + "csi-1", after: "csi-1"},
		"negative entries": {entries: -1, code: codes.InvalidArgument, word: "max_entries is -1"},
		"foreign token":    {token: "5", code: codes.Aborted, word: `"5"`},
	} {
		t.Run(name, func(t *testing.T) {
			after, err := parsePage(&csi.ListVolumesRequest{MaxEntries: c.entries, StartingToken: c.token})
			wantStatus(t, err, c.code, c.word)
			if after != c.after {
				t.Errorf("after %q; want %q", after, c.after)
			}
		})
	}
}

func TestUserKeys(t *testing.T) {
	got := userKeys(map[string]string{
		spec.KeyLayers: "dir://m/a", keyPodName: "pod", keyClaimName: "claim", keyProvisioner: "p", "storage.kubernetes.io": "mine",
	})
	if want := map[string]string{spec.KeyLayers: "dir://m/a", "storage.kubernetes.io": "mine"}; !maps.Equal(got, want) {
		t.Errorf("%v; want %v", got, want)
	}
}
