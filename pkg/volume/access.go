package volume

// Access is who may use a volume at the same time (CSI spec, VolumeCapability.AccessMode; Kubernetes' access modes).
type Access string

// The access modes.
const (
	SingleNode       Access = "SingleNode"       // RWO: pods of one node
	SinglePod        Access = "SinglePod"        // RWOP: one pod
	SingleNodeReader Access = "SingleNodeReader" // pods of one node, all reading
	ManyReaders      Access = "ManyReaders"      // ROX
	ManyWriters      Access = "ManyWriters"      // RWX
)

// readsOnly reports whether a volume of this mode is never written to.
func (a Access) readsOnly() bool { return a == ManyReaders || a == SingleNodeReader }

// manyNodes reports whether a volume of this mode is used on several nodes.
func (a Access) manyNodes() bool { return a == ManyReaders || a == ManyWriters }
