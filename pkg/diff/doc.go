// Package diff finds what an upper of overlayfs changes in the layers below it, and writes it as the tar of an image layer.
//
// The names that changed are those in the directories of the uppers. What stands behind a name is read from a read-only overlay of the
// uppers and the layers, the view: the kernel follows redirects, finds the data of metacopy files, and knows whiteouts in all their
// forms. The layers' own overlay, the base, tells what was there before. A directory that was moved, or that hides what the layers have
// at its place, is written whole.
//
// # The tar
//
// It is that of "Representing Changes" in the image specification (layer.md). Its entries are in the order of the tree, the names of a
// directory sorted by their bytes, and nothing in it depends on the time, the machine or the order in which a file system lists names:
// the same tree gives the same bytes.
//
//   - A name that the layers have and the view lacks is a whiteout, .wh.NAME.
//   - A directory that hides a directory of the layers has .wh..wh..opq as its first entry.
//   - The second name of a file is a hard link to the first one in the tar.
//   - A sparse file is written whole: the specification advises against sparse entries.
//   - Extended attributes are PAX records. Those that a layer cannot have on another machine are left out (unpack.IsIgnoredXattr).
//   - Sockets are left out, as tar(1) does.
//
// What a layer cannot carry is refused, and the error names the file.
//
// # Limits
//
// A pod chooses the names, the depth and the number of files. 16 directories on the way are open at most, and some ten thousand names
// are in memory: those of a larger directory are read in several passes. Paths have at most 4095 bytes, as the kernel and the programs
// that unpack layers take them. The names of files with several links are in memory until all of them were met, at most 64 MiB.
package diff
