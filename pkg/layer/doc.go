// Package layer turns layer references into open directories.
//
// A [Resolver] opens dir:// references beneath the layer roots that the operator configured ([Roots]), volume:// references in other
// volumes of the pod ([PodVolumes]), and oci:// and archive:// references in the layer store. The directories of one volume are its
// [ResolvedLayers]. They stay open until the view is mounted, so that a rename cannot replace one of them.
//
// Paths are resolved by the kernel beneath their root (openat2(2), RESOLVE_BENEATH). No layer may be in the driver's data root or
// contain it ([ProtectedDir]).
package layer
