// Package registry talks to container registries: it resolves tags, fetches manifests, and downloads blobs.
//
// A Client is configured once, with containerd's certs.d directory for hosts and mirrors, and the node's credentials. A
// Repository is one image's repository as one set of Credentials sees it.
//
// Registries are not trusted. All content is verified against its digest or bounded, credentials stay with the host that
// they are for, and an error of a registry is an *Error, whose text is bounded and without the queries of signed URLs.
// Error.Kind says what to do about it: an error that errdefs.IsUnavailable reports may be gone later.
package registry
