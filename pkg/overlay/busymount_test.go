package overlay

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

func TestBusyMount(t *testing.T) {
	for name, m := range mounters(t) {
		t.Run(name, func(t *testing.T) {
			dir := tmpfs(t)
			busy := open(t, dir+"/a/b")
			if err := m.AddBusyMount(busy); err != nil {
				t.Fatal(err)
			}
			if err := linux.Unmount(dir); !errors.Is(err, unix.EBUSY) {
				t.Errorf("unmount a file system with a busy mount: %v", err)
			}
			busy.Close()
			root := open(t, dir+"/a/b")
			if err := os.Mkdir(root.Name()+"/x", 0o755); !errors.Is(err, unix.EROFS) {
				t.Errorf("a busy mount takes writes: %v", err)
			}
			if err := m.Detach(root); err != nil {
				t.Fatal(err)
			}
			if err := m.Detach(root); err != nil {
				t.Errorf("detach again: %v", err)
			}
			root.Close()
			if err := linux.Unmount(dir); err != nil {
				t.Errorf("unmount after the busy mount is gone: %v", err)
			}
		})
	}
}

// TestBusyMountFollowsNoName: a busy mount is made at the directory that was opened, whatever has its name by then. Two pods of one
// tenant exchange the directory and a link to a directory of the host.
func TestBusyMountFollowsNoName(t *testing.T) {
	for name, m := range mounters(t) {
		t.Run(name, func(t *testing.T) {
			volume, host := tmpfs(t), tmpfs(t)
			dir, link := filepath.Join(volume, "dir"), filepath.Join(volume, "link")
			busy := open(t, dir)
			if err := os.Symlink(host, link); err != nil {
				t.Fatal(err)
			}
			exchange := func() {
				t.Helper()
				if err := linux.Renameat(nil, dir, nil, link, linux.RenameExchange); err != nil {
					t.Fatal(err)
				}
			}
			exchange()
			before, err := linux.MountID(open(t, host))
			if err != nil {
				t.Fatal(err)
			}
			if err := m.AddBusyMount(busy); err != nil {
				t.Fatal(err)
			}
			if after, err := linux.MountID(open(t, host)); err != nil || after != before {
				t.Errorf("the tenant's directory is mounted on one of the host (%v)", err)
				_ = linux.UnmountLazily(host)
			}
			if mounted, err := linux.IsMountPoint(link); err != nil || !mounted {
				t.Errorf("the opened directory has no busy mount: %v", err)
			}
			if err := m.Detach(open(t, link)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestBindFollowsNoName is the same of a view that is published at a second target.
func TestBindFollowsNoName(t *testing.T) {
	for name, m := range mounters(t) {
		t.Run(name, func(t *testing.T) {
			view, targets, host := tmpfs(t), tmpfs(t), tmpfs(t)
			path := filepath.Join(targets, "target")
			target := open(t, path)
			if err := errors.Join(os.Rename(path, path+".moved"), os.Symlink(host, path)); err != nil {
				t.Fatal(err)
			}
			if err := m.Bind(open(t, view), target, Attributes{ReadOnly: true}); err != nil {
				t.Fatal(err)
			}
			if mounted, err := linux.IsMountPoint(path + ".moved"); err != nil || !mounted {
				t.Errorf("nothing is mounted at the opened target: %v", err)
			}
			if err := os.Mkdir(filepath.Join(path+".moved", "x"), 0o755); !errors.Is(err, unix.EROFS) {
				t.Errorf("a read-only bind takes writes: %v", err)
			}
			if err := linux.UnmountLazily(path + ".moved"); err != nil {
				t.Error(err)
			}
		})
	}
}
