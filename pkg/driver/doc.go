// Package driver serves the CSI services of one node: Identity, Controller and Node.
//
// A handler validates its request, converts it into a value of package volume, makes one call, and answers. What holds for
// all RPCs is in interceptors: the log line, the redaction of secrets, the recovery from panics, and the conversion of
// errors. Packages below this one wrap kinds of containerd/errdefs; toStatus is the one function that makes a gRPC code of
// them.
//
// Only this package and kubelet's registration import gRPC.
package driver
