package unpack_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"

	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestUnpacksAsContainerdDoes has entries of images that people have, which containerd takes. It compares the tree with that of
// containerd's overlayfs snapshotter.
func TestUnpacksAsContainerdDoes(t *testing.T) {
	user := func(typeflag byte, name string) registrytest.Entry {
		return registrytest.Entry{Header: tar.Header{
			Typeflag: typeflag, Name: name, Linkname: "file", Devmajor: 1, Devminor: 3, Mode: 0o644, ModTime: time.Unix(1_700_000_000, 0),
			PAXRecords: map[string]string{"SCHILY.xattr.user.comment": "x"},
		}}
	}
	device := func(typeflag byte, major, minor int64) registrytest.Entry {
		e := registrytest.File(fmt.Sprintf("%c-%d-%d", typeflag, major, minor), "")
		e.Typeflag, e.Devmajor, e.Devminor = typeflag, major, minor
		return e
	}
	owned := func(uid, gid int) registrytest.Entry {
		e := registrytest.File(fmt.Sprintf("owned-%d-%d", uid, gid), "")
		e.Uid, e.Gid, e.Format = uid, gid, tar.FormatGNU
		return e
	}
	for name, entries := range map[string][]registrytest.Entry{
		// git archive writes one, with the commit as its comment.
		"PAX global header": {
			{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{
				"comment": "e6acb02", "mtime": "1000", "uid": "1000", "SCHILY.xattr.user.all": "x",
			}}},
			registrytest.Dir("d"), registrytest.File("d/f", "x"),
		},
		// Linux has these attributes on regular files and directories alone.
		"user attributes": {
			user(tar.TypeReg, "file"), user(tar.TypeDir, "dir"), user(tar.TypeSymlink, "link"), user(tar.TypeFifo, "fifo"),
			user(tar.TypeChar, "char"), user(tar.TypeBlock, "block"),
		},
		"device numbers": {
			device(tar.TypeChar, 4095, 1<<20-1), device(tar.TypeBlock, 4095, 1<<20-1), device(tar.TypeChar, 0, 1<<20-1),
			device(tar.TypeBlock, 0, 0), device(tar.TypeFifo, 5000, 1<<20+7),
		},
		// nobody is -2 for some programs that write tars.
		"owners": {owned(1<<32-2, 1<<32-2), owned(-2, -2), owned(1<<31, 1<<31-1)},
	} {
		t.Run(name, func(t *testing.T) {
			dir := workDir(t)
			data := mustTar(t, entries...)
			theirs := filepath.Join(dir, "theirs")
			must(t, os.Mkdir(theirs, 0o755))
			_, err := archive.Apply(t.Context(), theirs, bytes.NewReader(data), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
			must(t, err)
			ours := filepath.Join(dir, "ours")
			mustUnpack(t, data, ours)
			// The times of the root are not the image's.
			without := implied(t, data)
			readTree(t, theirs, without).compare(t, readTree(t, ours, without))
		})
	}
}
