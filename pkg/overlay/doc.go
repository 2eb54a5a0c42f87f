// Package overlay mounts one overlay at a time: it turns a [Spec] into a mounted view by the kernel's mount API, or by mount(8) on a
// kernel whose overlayfs does not have that API, and answers questions about mount points without reading the mount table.
//
// What the kernel can do is probed once, by doing it; see [Features] and [KernelFeatures].
//
// The words lower, upper, work, whiteout and volatile are those of https://docs.kernel.org/filesystems/overlayfs.html. A view is one
// mounted overlay, writable unless the text says otherwise.
package overlay
