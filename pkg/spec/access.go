package spec

// AccessMode says which pods may use a volume at the same time. The values are Kubernetes' names.
type AccessMode string

// The access modes.
const (
	ReadWriteOnce    AccessMode = "ReadWriteOnce"    // pods of one node
	ReadWriteOncePod AccessMode = "ReadWriteOncePod" // one pod
	ReadOnlyMany     AccessMode = "ReadOnlyMany"     // pods of many nodes, which only read
	ReadWriteMany    AccessMode = "ReadWriteMany"    // pods of many nodes
	// SingleNodeReaderOnly is for pods of one node that only read. CSI has this mode, Kubernetes does not.
	SingleNodeReaderOnly AccessMode = "SingleNodeReaderOnly"
)

// readsOnly reports whether pods never write to a volume with this mode.
func (a AccessMode) readsOnly() bool { return a == ReadOnlyMany || a == SingleNodeReaderOnly }

// manyNodes reports whether pods of several nodes use a volume with this mode.
func (a AccessMode) manyNodes() bool { return a == ReadOnlyMany || a == ReadWriteMany }
