// Package unpack turns the tar of one image layer into a directory tree that overlayfs takes as a lower directory.
//
// Tar does all of it: files keep owner, mode, times and extended attributes, runs of zeros become holes, and the whiteouts
// of the OCI image specification become those of overlayfs (a character device 0/0, and the attribute
// trusted.overlay.opaque on a directory).
//
// The tar is not trusted. No path in it leads out of the tree: paths, and links that earlier entries made, are resolved
// with the tree as their root (openat2(2), RESOLVE_IN_ROOT). Limits bound what a layer may take of the disk.
package unpack
