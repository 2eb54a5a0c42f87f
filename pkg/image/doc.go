// Package image reads what describes images: the manifests and indexes of registries, and archives of images in files.
//
// Describe leads from a manifest or an index to the layers for one platform. OpenArchive does the same for a docker archive,
// an OCI archive or the directory of an OCI layout. Both return a Description, whose layers are LayerBlobs: what is known
// of a blob before it is read. LayerBlob.OpenTar turns the blob into the tar of a layer, whatever it is: a tar,
// compressed or not, or one file of an artifact.
//
// The package neither talks to registries nor writes layers. Digests are verified here: an error that wraps
// ErrContentMismatch says that content is not what a manifest or a reference promised.
package image
