package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"
	"k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

func TestParseMountOptions(t *testing.T) {
	safe := Attributes{NoSUID: true, NoDev: true}
	for name, c := range map[string]struct {
		options, allowed []string
		want             Attributes
		word             string
	}{
		"none":      {want: safe},
		"read-only": {options: []string{"ro"}, want: Attributes{NoSUID: true, NoDev: true, ReadOnly: true}},
		"several": {options: []string{"noexec", "noatime", "nosymfollow"},
			want: Attributes{NoSUID: true, NoDev: true, NoExec: true, ATime: "noatime", NoSymFollow: true}},
		"the last counts":  {options: []string{"noatime", "relatime"}, want: safe},
		"permitted":        {options: []string{"suid"}, allowed: []string{"suid"}, want: Attributes{NoDev: true}},
		"not permitted":    {options: []string{"suid"}, allowed: []string{"dev"}, word: "only the operator"},
		"unknown":          {options: []string{"lowerdir=/etc"}, word: "allowed are noatime"},
		"empty":            {options: []string{""}, word: "allowed are"},
		"with a separator": {options: []string{"ro,suid"}, word: "allowed are"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseMountOptions(c.options, c.allowed)
			if c.word == "" && (err != nil || got != c.want) {
				t.Errorf("got %+v, %v; want %+v", got, err, c.want)
			}
			if c.word != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.word)) {
				t.Errorf("got %v; want an invalid argument with %q", err, c.word)
			}
		})
	}
}

// mounters are one for each way to mount that this kernel has.
func mounters(t *testing.T) map[string]*Mounter {
	needs.Root(t)
	features, err := Probe(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]*Mounter{}
	for name, without := range map[string][]string{"by descriptor": nil, "by path": {"layer-fd", "statmount"}, "mount(8)": {"mount-api"}} {
		chosen, err := features.Without(without...)
		if err != nil {
			t.Fatal(err)
		}
		mounter, err := NewMounter(Config{
			Dir: t.TempDir(), Features: chosen, MountUtils: mount.NewWithoutSystemd(""), Commands: exec.New(),
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { mounter.Close() })
		found[name] = mounter
	}
	return found
}

// tmpfs mounts a file system that can hold uppers.
func tmpfs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := linux.OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return dir
}

func TestMounterIsAMountInterface(t *testing.T) {
	for name, m := range mounters(t) {
		t.Run(name, func(t *testing.T) {
			dir := tmpfs(t)
			target := filepath.Join(dir, "target")
			spec := Spec{Lowers: []*os.File{open(t, dir+"/lower")}, Upper: open(t, dir+"/upper"), Work: open(t, dir+"/work")}
			wantMountPoint := func(want bool) {
				t.Helper()
				is, err := m.IsMountPoint(target)
				not, errNot := m.IsLikelyNotMountPoint(target)
				if err != nil || errNot != nil || is != want || not == want {
					t.Errorf("mount point: %v, %v; likely not: %v, %v; want %v", is, err, not, errNot, want)
				}
			}
			if _, err := m.IsMountPoint(target); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a path that does not exist: %v", err)
			}
			handle := open(t, target)
			wantMountPoint(false)
			if err := m.Overlay(spec, handle); err != nil {
				t.Fatal(err)
			}
			wantMountPoint(true)
			if at, err := m.At(target); err != nil || at != Overlay {
				t.Errorf("at the target: %v, %v", at, err)
			}
			if at, err := m.At(dir); err != nil || at != Other {
				t.Errorf("at the tmpfs: %v, %v", at, err)
			}
			if at, err := m.At(filepath.Join(target, "missing")); err != nil || at != Nothing {
				t.Errorf("at nothing: %v, %v", at, err)
			}
			if inUse, err := m.UpperInUse(spec.Upper); err != nil || !inUse {
				t.Errorf("an upper in use: %v, %v", inUse, err)
			}
			list, err := m.List()
			if err != nil || !slices.ContainsFunc(list, func(p mount.MountPoint) bool {
				return p.Path == target && p.Type == "overlay" && p.Device == "overlay-csi"
			}) {
				t.Errorf("not in the list of mounts with the source overlay-csi: %v, %v", list, err)
			}
			// mount-utils' own helpers work with it.
			if err := mount.CleanupMountPoint(target, m, true); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(target); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("CleanupMountPoint left the target: %v", err)
			}
			if inUse, err := m.UpperInUse(spec.Upper); err != nil || inUse {
				t.Errorf("an upper not in use: %v, %v", inUse, err)
			}
			entries, err := os.ReadDir(dir + "/upper")
			if err != nil || len(entries) != 0 {
				t.Errorf("asking whether it is in use wrote to the upper: %v, %v", entries, err)
			}
		})
	}
}

func TestUnmountFollowsNoLink(t *testing.T) {
	for name, m := range mounters(t) {
		t.Run(name, func(t *testing.T) {
			dir := tmpfs(t)
			link := filepath.Join(t.TempDir(), "link")
			if err := os.Symlink(dir, link); err != nil {
				t.Fatal(err)
			}
			if err := m.Unmount(link); !errors.Is(err, unix.EINVAL) {
				t.Errorf("unmount a link to a mount point: %v", err)
			}
			if is, err := m.IsMountPoint(link); err != nil || is {
				t.Errorf("a link to a mount point: %v, %v", is, err)
			}
			if is, err := m.IsMountPoint(dir); err != nil || !is {
				t.Errorf("the mount is gone: %v", err)
			}
		})
	}
}

func TestSpecIsChecked(t *testing.T) {
	m := mounters(t)["by descriptor"]
	dir := tmpfs(t)
	a, b := open(t, dir+"/a"), open(t, dir+"/b")
	many := slices.Repeat([]*os.File{a}, MaxLowers+1)
	for name, spec := range map[string]Spec{
		"too many":               {Lowers: many},
		"upper without work":     {Lowers: []*os.File{a}, Upper: b},
		"volatile without upper": {Lowers: []*os.File{a}, Volatile: true},
		"a lower twice":          {Lowers: []*os.File{a, a}},
	} {
		t.Run(name, func(t *testing.T) {
			if err := m.Overlay(spec, open(t, dir+"/target")); !errdefs.IsInvalidArgument(err) {
				t.Error(err)
			}
		})
	}
}

// TestKernelMessages: what the kernel says of a refused overlay is in the error.
func TestKernelMessages(t *testing.T) {
	requireFeature(t, "mount-api")
	m := mounters(t)["by descriptor"]
	one, two := tmpfs(t), tmpfs(t)
	spec := Spec{Lowers: []*os.File{open(t, one+"/lower")}, Upper: open(t, one+"/upper"), Work: open(t, two+"/work")}
	err := m.Overlay(spec, open(t, one+"/target"))
	if err == nil || !errors.Is(err, unix.EINVAL) {
		t.Fatalf("upper and work on two file systems: %v", err)
	}
	if text := fmt.Sprint(err); !strings.Contains(text, "fsconfig create overlay: ") {
		t.Errorf("%s", text)
	}
}

// TestFullDisk: where the disk has no room for what overlayfs makes when it is mounted, there is an error and no view: the kernel's own
// answer is one that cannot be written to.
func TestFullDisk(t *testing.T) {
	for name, m := range mounters(t) {
		for access, attributes := range map[string]Attributes{"": {}, ", read-only": {ReadOnly: true}} {
			if access != "" && name == "mount(8)" {
				// Its views are read-only as a whole.
				continue
			}
			t.Run(name+access, func(t *testing.T) {
				dir, target := tmpfs(t), t.TempDir()
				spec := Spec{
					Lowers: []*os.File{open(t, dir+"/lower")}, Upper: open(t, dir+"/upper"), Work: open(t, dir+"/work"), Attributes: attributes,
				}
				// The inodes of the root and the three directories.
				if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "nr_inodes=4"); err != nil {
					t.Fatal(err)
				}
				if err := m.Overlay(spec, open(t, target)); !errdefs.IsResourceExhausted(err) || !errors.Is(err, unix.ENOSPC) {
					t.Errorf("got %v, want no space left", err)
				}
				if mounted, err := m.At(target); err != nil || mounted != Nothing {
					t.Fatalf("mounted: %v, %v", mounted, err)
				}
				if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "nr_inodes=16"); err != nil {
					t.Fatal(err)
				}
				if err := m.Overlay(spec, open(t, target)); err != nil {
					t.Fatal(err)
				}
				defer func() {
					if err := m.Unmount(target); err != nil {
						t.Error(err)
					}
				}()
				err := os.WriteFile(target+"/file", nil, 0o600)
				if attributes.ReadOnly != errors.Is(err, unix.EROFS) || (err != nil && !attributes.ReadOnly) {
					t.Errorf("write: %v", err)
				}
			})
		}
	}
}

// TestMostLowers: as many lowers as overlayfs takes can be mounted, and all of them show.
func TestMostLowers(t *testing.T) {
	for name, m := range mounters(t) {
		t.Run(name, func(t *testing.T) {
			dir := tmpfs(t)
			spec := Spec{Upper: open(t, dir+"/upper"), Work: open(t, dir+"/work")}
			for i := range MaxLowers {
				lower := open(t, fmt.Sprintf("%s/lower-%d", dir, i))
				spec.Lowers = append(spec.Lowers, lower)
				if err := os.WriteFile(fmt.Sprintf("%s/%d", lower.Name(), i), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			target := dir + "/target"
			if err := m.Overlay(spec, open(t, target)); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := m.Unmount(target); err != nil {
					t.Error(err)
				}
			}()
			if entries, err := os.ReadDir(target); err != nil || len(entries) != MaxLowers {
				t.Errorf("%d of %d lowers show: %v", len(entries), MaxLowers, err)
			}
		})
	}
}
