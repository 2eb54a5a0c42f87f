// Package unpack unpacks the tar of one image layer into a directory tree that can be a lower directory of overlayfs, or into an EROFS
// image that is such a tree.
//
// Files have the owner, mode, times and extended attributes of their entries. Runs of zeros become holes. Whiteouts of the
// OCI image specification become whiteouts of overlayfs: a character device 0/0, or the attribute trusted.overlay.opaque on
// a directory. A directory with whiteouts has the attribute trusted.overlay.origin, so that no view lists them.
//
// The tar is not trusted. Paths in it, and links from earlier entries, are resolved with the tree as their root
// (openat2(2), RESOLVE_IN_ROOT). Limits bound the disk space that a layer may take.
package unpack
