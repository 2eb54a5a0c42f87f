// Package driver serves the CSI services of one node: Identity, Controller and Node.
//
// A handler validates its request, converts it into a value of package volume, makes one call, and answers. Interceptors do
// what all RPCs need: they log, redact secrets, recover from panics, and convert errors. Packages below this one wrap kinds
// of containerd/errdefs. Only toStatus converts them into gRPC codes.
//
// Only this package and kubelet's registration import gRPC.
package driver
