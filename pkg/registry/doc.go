// Package registry is a client of container registries: it resolves tags, fetches manifests, downloads blobs, and pushes and
// deletes images.
//
// A Client is configured with containerd's certs.d directory for hosts and mirrors, and with the node's credentials. A
// Repository is the repository of one image, accessed with one set of Credentials.
//
// Registries are not trusted. Manifests are verified against their digests; the caller verifies blobs. All answers are
// bounded. Logins, tokens and configured headers stay with their host and port (origin.go). Errors of a registry are of type
// *Error. Their text is bounded and does not contain the queries of signed URLs. A request may be retried if
// errdefs.IsUnavailable reports its error.
package registry
