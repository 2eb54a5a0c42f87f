// Package erofs builds EROFS images of two files, and mounts them.
//
// The data file has the contents of regular files one after the other, as they come. The metadata file has everything else, and is written
// at the end. It names the data file as an extra device. Linux 6.12 and newer mount the two files without a loop device.
//
// Until the metadata is written, the names and inodes are in memory, in tables without pointers: [BytesPerEntry] for each entry, and the
// bytes of its name. [MaxEntries] and [MaxTextBytes] bound them. An [Image] that would exceed them, or that EROFS has no form for, fails
// with [ErrCannotHold].
//
// The methods of an [Image] do what system calls of the same names do on a file system, with the same errors. A tree of files can so be
// made by one set of rules on a disk or in an image. The same calls make the same bytes.
//
// The format is that of the kernel's fs/erofs/erofs_fs.h, with what Linux 5.16 and newer read: 4096-byte blocks, extended inodes,
// regular files in chunks, without compression. A file without holes is one chunk. It is described in Documentation/filesystems/erofs.rst.
package erofs
