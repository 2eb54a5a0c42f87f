// Package image reads the metadata of images: manifests and indexes of registries, and archives of images in files. Package compose
// makes new ones.
//
// Describe returns the layers of an image for one platform. OpenArchive does the same for a docker archive, an OCI archive or
// the directory of an OCI layout. Both return a Description. Its layers are LayerBlobs, which describe blobs that are not
// yet read. LayerBlob.OpenTar converts a blob to the tar of a layer. The blob may be a tar, a compressed tar or a single
// file of an artifact.
//
// The package neither accesses registries nor writes layers. It verifies digests. An error wraps ErrContentMismatch if
// content differs from its descriptor.
package image
