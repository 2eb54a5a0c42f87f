package driver

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/rebase"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// Keys that kubelet and the sidecars add to a volume's context and parameters (Kubernetes CSI documentation, "Pod Info
// on Mount" and "Provisioning").
const (
	keyEphemeral    = "csi.storage.k8s.io/ephemeral"
	keyPodUID       = "csi.storage.k8s.io/pod.uid"
	keyPodName      = "csi.storage.k8s.io/pod.name"
	keyPodNamespace = "csi.storage.k8s.io/pod.namespace"
	// keyClaimName and keyClaimNamespace are set if external-provisioner runs with --extra-create-metadata.
	keyClaimName      = "csi.storage.k8s.io/pvc/name"
	keyClaimNamespace = "csi.storage.k8s.io/pvc/namespace"
	// keyProvisioner is in the context of every volume that external-provisioner created.
	keyProvisioner = "storage.kubernetes.io/csiProvisionerIdentity"
)

// addedPrefixes are the prefixes of the keys that users do not write.
var addedPrefixes = []string{"csi.storage.k8s.io/", "storage.kubernetes.io/"}

// accessModes maps the CSI access modes that the driver supports to Kubernetes' access modes.
var accessModes = map[csi.VolumeCapability_AccessMode_Mode]spec.AccessMode{
	csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER:        spec.ReadWriteOnce,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:  spec.ReadWriteOnce,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER: spec.ReadWriteOncePod,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:   spec.SingleNodeReaderOnly,
	csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY:    spec.ReadOnlyMany,
	csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER:   spec.ReadWriteMany,
}

// publishRequest validates kubelet's request and converts it. It reads nothing but its arguments.
func publishRequest(req *csi.NodePublishVolumeRequest, allowedMountOptions []string) (volume.PublishRequest, error) {
	if err := record.CheckID(req.GetVolumeId()); err != nil {
		return volume.PublishRequest{}, err
	}
	if err := volume.CheckTarget(req.GetTargetPath()); err != nil {
		return volume.PublishRequest{}, err
	}
	access, err := accessModeOf(req.GetVolumeCapability())
	if err != nil {
		return volume.PublishRequest{}, err
	}
	attributes, err := overlay.ParseMountOptions(req.GetVolumeCapability().GetMount().GetMountFlags(), allowedMountOptions)
	if err != nil {
		return volume.PublishRequest{}, err
	}
	volumeContext := req.GetVolumeContext()
	inline, err := parseEphemeral(volumeContext[keyEphemeral])
	if err != nil {
		return volume.PublishRequest{}, err
	}
	parsed, err := spec.Parse(userKeys(volumeContext), spec.Scope{Inline: inline, Access: access})
	if err != nil {
		return volume.PublishRequest{}, err
	}
	// The pod's fsGroup, which kubelet passes to drivers with the capability VOLUME_MOUNT_GROUP.
	var group *uint32
	if text := req.GetVolumeCapability().GetMount().GetVolumeMountGroup(); text != "" {
		parsed, err := spec.ParseGroup(text)
		if err != nil {
			return volume.PublishRequest{}, err
		}
		group = &parsed
	}
	if parsed.Commit != "" && (attributes.ReadOnly || req.GetReadonly()) {
		return volume.PublishRequest{}, fmt.Errorf("%w: key %q: a read-only volume has nothing to commit; leave readOnly out",
			errdefs.ErrInvalidArgument, spec.KeyCommit)
	}
	attributes.ReadOnly = attributes.ReadOnly || req.GetReadonly() || parsed.Upper == spec.UpperNone
	return volume.PublishRequest{
		VolumeID:    req.GetVolumeId(),
		Target:      req.GetTargetPath(),
		Spec:        parsed,
		Inline:      inline,
		Provisioned: volumeContext[keyProvisioner] != "",
		Access:      access,
		Attributes:  attributes,
		Group:       group,
		Secrets:     req.GetSecrets(),
		Pod: kubelet.Pod{
			UID:       volumeContext[keyPodUID],
			Namespace: volumeContext[keyPodNamespace],
			Name:      volumeContext[keyPodName],
		},
	}, nil
}

// createRequest validates the provisioner's request and converts it. It reads nothing but its argument.
func createRequest(req *csi.CreateVolumeRequest) (volume.CreateRequest, error) {
	required, limit, err := capacityRange(req.GetCapacityRange())
	if err != nil {
		return volume.CreateRequest{}, err
	}
	switch {
	case req.GetName() == "":
		return volume.CreateRequest{}, fmt.Errorf("%w: the volume name is missing", errdefs.ErrInvalidArgument)
	case len(req.GetName()) > 128:
		return volume.CreateRequest{}, fmt.Errorf("%w: the volume name has %d bytes, the maximum is 128",
			errdefs.ErrInvalidArgument, len(req.GetName()))
	case len(req.GetMutableParameters()) > 0:
		return volume.CreateRequest{}, fmt.Errorf("%w: the driver has no mutable parameters; leave the VolumeAttributesClass out",
			errdefs.ErrInvalidArgument)
	}
	access, parsed, err := parseCapabilities(userKeys(req.GetParameters()), spec.Scope{Create: true}, req.GetVolumeCapabilities())
	if err != nil {
		return volume.CreateRequest{}, err
	}
	onConflict, err := rebase.ParsePolicy(req.GetParameters()[spec.KeyOnConflict])
	if err != nil {
		return volume.CreateRequest{}, fmt.Errorf("key %q: %w", spec.KeyOnConflict, err)
	}
	var source volume.Source
	if req.GetVolumeContentSource() != nil {
		if source, err = parseSource(req.GetVolumeContentSource()); err != nil {
			return volume.CreateRequest{}, err
		}
		if parsed.Upper != spec.UpperClaim {
			return volume.CreateRequest{}, fmt.Errorf("%w: a volume that is made from %s needs upper: claim, and is to have upper: %s",
				errdefs.ErrInvalidArgument, describeSource(source), parsed.Upper)
		}
	}
	switch {
	case !parsed.ManagesUpper():
	case required > 0:
		parsed.Size = max(required, spec.MinPersistentSize)
	case limit > 0 && source == (volume.Source{}):
		// Without a size the volume could become bigger than the limit. The limit is the most useful size that keeps to it.
		parsed.Size = max(limit, spec.MinPersistentSize)
	}
	if limit > 0 && parsed.Size > limit {
		return volume.CreateRequest{}, fmt.Errorf("%w: the capacity limit is %d bytes, the volume has at least %d",
			errdefs.ErrOutOfRange, limit, parsed.Size)
	}
	if source == (volume.Source{}) {
		// A volume that is made from another one has the size of that if none is asked for.
		if err := parsed.CheckSized(); err != nil {
			return volume.CreateRequest{}, err
		}
	}
	return volume.CreateRequest{
		Name: req.GetName(), Spec: parsed, Source: source, Access: access, Secrets: req.GetSecrets(), Required: required, Limit: limit,
		Namespace: req.GetParameters()[keyClaimNamespace], OnConflict: onConflict,
	}, nil
}

// capacityRange returns the bounds of a volume's size in bytes. Zero is no bound. It returns ErrInvalidArgument if a bound is
// negative, or if they exclude each other.
func capacityRange(capacity *csi.CapacityRange) (required, limit int64, err error) {
	required, limit = capacity.GetRequiredBytes(), capacity.GetLimitBytes()
	if required < 0 || limit < 0 || (limit > 0 && required > limit) {
		return 0, 0, fmt.Errorf("%w: invalid capacity range: at least %d bytes and at most %d", errdefs.ErrInvalidArgument, required, limit)
	}
	return required, limit, nil
}

// accessModeOrder has the access modes from the narrowest to the widest. A volume with several has the widest.
var accessModeOrder = []spec.AccessMode{
	spec.ReadWriteOncePod,
	spec.SingleNodeReaderOnly,
	spec.ReadWriteOnce,
	spec.ReadOnlyMany,
	spec.ReadWriteMany,
}

// parseCapabilities parses the keys for each of the capabilities. It returns ErrInvalidArgument if they mean different
// volumes for different capabilities.
func parseCapabilities(parameters map[string]string, scope spec.Scope, capabilities []*csi.VolumeCapability,
) (spec.AccessMode, spec.Spec, error) {
	if len(capabilities) == 0 {
		return "", spec.Spec{}, fmt.Errorf("%w: the volume capabilities are missing", errdefs.ErrInvalidArgument)
	}
	var widest spec.AccessMode
	var first spec.Spec
	for i, capability := range capabilities {
		access, err := accessModeOf(capability)
		if err != nil {
			return "", spec.Spec{}, err
		}
		if _, err := overlay.ParseMountOptions(capability.GetMount().GetMountFlags(), overlay.LooseningOptions()); err != nil {
			return "", spec.Spec{}, err
		}
		scope.Access = access
		parsed, err := spec.Parse(parameters, scope)
		if err != nil {
			return "", spec.Spec{}, err
		}
		if i == 0 {
			first = parsed
		} else if !first.Equal(parsed) {
			return "", spec.Spec{}, fmt.Errorf("%w: the claim's access modes have different default uppers; use one access mode, or set upper",
				errdefs.ErrInvalidArgument)
		}
		if slices.Index(accessModeOrder, access) > slices.Index(accessModeOrder, widest) {
			widest = access
		}
	}
	return widest, first, nil
}

// accessModeOf returns the access mode of a capability. It returns ErrInvalidArgument if the driver does not support the
// capability.
func accessModeOf(capability *csi.VolumeCapability) (spec.AccessMode, error) {
	switch {
	case capability == nil:
		return "", fmt.Errorf("%w: the volume capability is missing", errdefs.ErrInvalidArgument)
	case capability.GetBlock() != nil:
		return "", fmt.Errorf("%w: block volumes are not supported; volumeMode must be Filesystem", errdefs.ErrInvalidArgument)
	case capability.GetMount() == nil:
		return "", fmt.Errorf("%w: the access type of the volume capability is missing", errdefs.ErrInvalidArgument)
	case capability.GetMount().GetFsType() != "" && capability.GetMount().GetFsType() != "overlay":
		return "", fmt.Errorf("%w: fsType %q is not supported; leave fsType out",
			errdefs.ErrInvalidArgument, capability.GetMount().GetFsType())
	}
	mode := capability.GetAccessMode().GetMode()
	access, ok := accessModes[mode]
	if !ok {
		return "", fmt.Errorf("%w: access mode %s is not supported; use ReadWriteOnce, ReadWriteOncePod, ReadOnlyMany or ReadWriteMany",
			errdefs.ErrInvalidArgument, mode)
	}
	return access, nil
}

// parseEphemeral parses the value of keyEphemeral, which is missing for a volume that is not inline.
func parseEphemeral(value string) (bool, error) {
	if value == "" {
		return false, nil
	}
	inline, err := strconv.ParseBool(value)
	if err != nil {
		return false, fmt.Errorf("%w: %s is %q; it must be true or false", errdefs.ErrInvalidArgument, keyEphemeral, value)
	}
	return inline, nil
}

// userKeys returns parameters without the keys that kubelet and the sidecars added.
func userKeys(parameters map[string]string) map[string]string {
	keys := make(map[string]string, len(parameters))
	for key, value := range parameters {
		if !slices.ContainsFunc(addedPrefixes, func(prefix string) bool { return strings.HasPrefix(key, prefix) }) {
			keys[key] = value
		}
	}
	return keys
}
