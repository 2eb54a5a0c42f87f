// Package dataroot owns the driver's directory on a node: the lock that makes one process its user, the names of everything
// in it, and the deletion of what is no longer needed.
//
// The layout of a data root, with the package that has the details:
//
//	volumes/<volume handle>/volume.json                 the record (pkg/record)
//	volumes/<volume handle>/persistent                  an empty file: the record outlives pods and power cuts (pkg/record)
//	volumes/<volume handle>/{upper/, work/}             an upper (pkg/upper), of an inline volume or of a claim with upper: claim:
//	volumes/<volume handle>/data/{upper/, work/}          directory, project quota or btrfs qgroup, disk image
//	volumes/<volume handle>/disk.img
//	volumes/<volume handle>/pods/<pod>/…                the same for each pod of a claim with upper: pod
//	frozen/<id>/{upper/ or data/ or disk.img}           an upper that became read-only (pkg/upper)
//	snapshots/<snapshot ID>/snapshot.json               what a snapshot consists of (pkg/record)
//	caches/<namespace>/<name>/cache.json                what the newest version of a cache consists of (pkg/record)
//	layers/sha256/<diff ID>/{tree/, layer.json, implied}  unpacked layers (pkg/store)
//	layers/incoming/<key>/…                             layers that are being pulled (pkg/store)
//	images/<digest>.json                                what an image consists of (pkg/store)
//	mounter/                                            what mount(8) needs, and probes of the kernel (pkg/overlay)
//	ballast/<number>                                    disk space for a full disk (Ballast)
//	trash/<name>                                        what is being deleted (Deleter)
//	overlayctl.sock                                     the operator's socket (pkg/admin)
package dataroot
