// Package squash merges several uppers of overlayfs into one, and copies one that an overlay writes to.
//
// The merged directory is made of what overlayfs looks up: for each name, Merge takes the steps of ovl_lookup (fs/overlayfs/namei.c) in
// the uppers alone. What the lookup has found then is in the merged directory, and what it would go on with below is written there in
// overlayfs's own form: a whiteout, an opaque directory, or a redirect. So the view does not depend on what lies below the uppers, and
// not on what lies above: a redirect in an upper above is looked up by the same path.
package squash
