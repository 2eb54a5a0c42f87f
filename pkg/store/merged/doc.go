// Package merged looks at the layers of an image as overlayfs merges them, without a mount: it opens a directory of the image in its
// layers, and it finds the attributes that directories without an entry should have.
package merged
