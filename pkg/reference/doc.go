// Package reference parses layer references, which are what a user writes to name a layer of a volume:
//
//	dir://ROOT/path                         a directory beneath a layer root of the node
//	archive://ROOT/file.tar                 an image archive or a tar beneath a layer root
//	oci://registry/repository:tag?path=/a   an image, or one directory of it; ?platform=linux/arm64 names its platform
//	volume://NAME/path                      a directory in another volume of the same pod
//
// The package is pure: it asks neither the node nor a registry.
package reference
