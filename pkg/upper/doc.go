// Package upper makes, opens, limits and discards the writable side of overlays: an upper directory and the work directory
// that overlayfs wants beside it.
//
// [Backends] chooses how the uppers of a volume are stored, and opens them. [Upper] has their life cycle.
// docs/architecture.md says how to add a backend.
//
// # On the disk
//
// An upper has a base directory, a path beneath the data root. The backends put this into it:
//
//	directory       upper/, work/                      no limit
//	project-quota   data/{upper/, work/}               data belongs to a project of ext4 or xfs, which has the limit
//	btrfs-qgroup    data/{upper/, work/}               data is a subvolume, whose qgroup has the limit
//	disk-image      disk.img                           ext4 of the size of the limit, with upper/ and work/ in it
//	tmpfs           nothing                            a tmpfs of the size of the limit, with upper/ and work/ in it
//	pod-volume      nothing                            the directory in the other volume has upper/, work/ and overlay-csi.json
//
// The file systems of disk-image and tmpfs are mounted in Config.MountDir, at the first half of the SHA-256 of the base in
// hexadecimal, while the upper is in use.
//
// A frozen upper, which became read-only, is in frozen/<id> beneath the data root: upper/, data/ or disk.img, as its backend had it.
//
// Names that end in .new are being made, and are renamed when they are complete. A crash may leave them; the next Prepare
// uses or replaces them.
package upper
