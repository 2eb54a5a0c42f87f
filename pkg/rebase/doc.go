// Package rebase moves uppers of overlayfs from the layers that they were written on to other ones.
//
// It is a three-way merge, entry by entry: what the old layers have, what the uppers make of it, and what the new layers have. Only the
// entries that the uppers have are compared, so that it takes as long as there are of them, whatever the layers are. What both sides
// changed, each in its own way, is a conflict, and a [Policy] says who wins.
//
// The uppers are read as overlayfs looks names up in them (package squash): a directory that was moved, and a file of which only the
// metadata was copied up, are compared with what they go on with below. The uppers themselves never change. Where other uppers are
// needed, because an entry has to give way to the new layers, [Write] makes one of them all.
package rebase
