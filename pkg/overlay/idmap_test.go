package overlay

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/needs"
)

func TestMapping(t *testing.T) {
	const last = maxID
	for name, c := range map[string]struct {
		swaps []Swap
		want  string
	}{
		"nothing":                   {nil, "0:0:4294967295"},
		"an ID with itself":         {[]Swap{{5, 5}}, "0:0:4294967295"},
		"there and back":            {[]Swap{{5, 9}, {9, 5}}, "0:0:4294967295"},
		"root":                      {[]Swap{{0, 1000}}, "0:1000:1,1:1:999,1000:0:1,1001:1001:4294966294"},
		"root's neighbour":          {[]Swap{{1, 0}}, "0:1:1,1:0:1,2:2:4294967293"},
		"the last one":              {[]Swap{{7, last}}, "0:0:7,7:4294967294:1,8:8:4294967286,4294967294:7:1"},
		"two groups":                {[]Swap{{1000, 1000}, {1000, 2000}}, "0:0:1000,1000:2000:1,1001:1001:999,2000:1000:1,2001:2001:4294965294"},
		"an older upper":            {[]Swap{{0, 3}, {3, 5}}, "0:5:1,1:1:2,3:0:1,4:4:1,5:3:1,6:6:4294967289"},
		"its first group":           {[]Swap{{0, 3}, {3, 3}}, "0:3:1,1:1:2,3:0:1,4:4:4294967291"},
		"the group that it had":     {[]Swap{{0, 3}, {3, 0}}, "0:0:4294967295"},
		"neighbours in other order": {[]Swap{{6, 5}, {5, 4}}, "0:0:4,4:5:1,5:6:1,6:4:1,7:7:4294967288"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := mapping(c.swaps...); got != c.want {
				t.Errorf("mapping is %s, want %s", got, c.want)
			}
		})
	}
}

// TestUpperGroups: files show other groups and are stored as they were.
func TestUpperGroups(t *testing.T) {
	for name, m := range mounters(t) {
		t.Run(name, func(t *testing.T) {
			requireFeature(t, "id-mapped-upper")
			dir := tmpfs(t)
			target := filepath.Join(dir, "target")
			spec := Spec{
				Lowers: []*os.File{open(t, dir+"/lower")}, Upper: open(t, dir+"/base/upper"), Work: open(t, dir+"/base/work"),
				UpperGroups: []Swap{{A: 1000, B: 2000}},
			}
			can, err := m.MapsGroups(spec.Upper, spec.UpperGroups)
			if err != nil || !can {
				t.Skipf("this kernel's tmpfs has no ID mapping: %v, %v", can, err)
			}
			file := filepath.Join(dir, "base/upper/f")
			check(t, os.WriteFile(file, nil, 0o600))
			check(t, os.Chown(file, 5, 1000))
			check(t, m.Overlay(spec, open(t, target)))
			defer func() { check(t, m.Unmount(target)) }()
			wantGroup(t, filepath.Join(target, "f"), 2000)
			check(t, os.WriteFile(filepath.Join(target, "new"), nil, 0o600))
			check(t, os.Chown(filepath.Join(target, "new"), 5, 2000))
			wantGroup(t, filepath.Join(dir, "base/upper/new"), 1000)
			check(t, os.Chown(filepath.Join(target, "f"), 5, 1000))
			wantGroup(t, file, 2000)
			if inUse, err := m.UpperInUse(spec.Upper); err != nil || !inUse {
				t.Errorf("the upper is in use: %v, %v", inUse, err)
			}
		})
	}
}

// TestFrozenUppers: frozen uppers lie above the layers, each of them with groups of its own, on detached mounts too. What they hide is
// hidden, and the owner of the layers is not theirs.
func TestFrozenUppers(t *testing.T) {
	for name, m := range mounters(t) {
		t.Run(name, func(t *testing.T) {
			requireFeature(t, "id-mapped-upper")
			dir := tmpfs(t)
			detached := func(name string) *os.File {
				mount, err := detachedCopy(open(t, filepath.Join(dir, name)).Name())
				check(t, err)
				t.Cleanup(func() { mount.Close() })
				return mount
			}
			for name, group := range map[string]int{"first/a": 1000, "second/a": 1, "second/b": 3000, "third/c": 7, "layer/d": 0, "layer/e": 0} {
				path := filepath.Join(dir, name)
				check(t, os.MkdirAll(filepath.Dir(path), 0o755))
				check(t, os.WriteFile(path, []byte(name), 0o600))
				check(t, os.Chown(path, 0, group))
			}
			check(t, unix.Mknod(filepath.Join(dir, "second/e"), unix.S_IFCHR, 0))
			spec := Spec{
				Frozen: []FrozenUpper{
					{Dir: open(t, dir+"/first"), Groups: []Swap{{A: 1000, B: 2000}}},
					{Dir: detached("second"), Groups: []Swap{{A: 3000, B: 2000}}, Detached: true},
					{Dir: detached("third"), Detached: true},
				},
				Lowers: []*os.File{open(t, dir+"/layer")}, Upper: open(t, dir+"/upper"), Work: open(t, dir+"/work"),
				LayerOwner: IDs{GID: 2000},
			}
			target := filepath.Join(dir, "target")
			check(t, m.Overlay(spec, open(t, target)))
			defer func() { check(t, m.Unmount(target)) }()
			for name, group := range map[string]uint32{"a": 2000, "b": 2000, "c": 7, "d": 2000} {
				wantGroup(t, filepath.Join(target, name), group)
			}
			if content, err := os.ReadFile(filepath.Join(target, "a")); err != nil || string(content) != "first/a" {
				t.Errorf("a is %q, %v", content, err)
			}
			if _, err := os.Lstat(filepath.Join(target, "e")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("what a frozen upper removes shows: %v", err)
			}
			// A copy has the owner that the view shows.
			check(t, os.Chmod(filepath.Join(target, "b"), 0o640))
			wantGroup(t, filepath.Join(dir, "upper/b"), 2000)
			if entries, err := os.ReadDir(m.scratch); err != nil || len(entries) > 0 {
				t.Errorf("left of the mount: %v, %v", entries, err)
			}
		})
	}
}

// TestFrozenGroupsOnAnOldKernel: a kernel that cannot show them is no reason to show others.
func TestFrozenGroupsOnAnOldKernel(t *testing.T) {
	dir := open(t, t.TempDir())
	m := &Mounter{}
	spec := Spec{Frozen: []FrozenUpper{{Dir: dir, Groups: []Swap{{1, 2}}}}, Lowers: []*os.File{dir}}
	if _, err := m.mapLowers(&spec); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "fsGroup") {
		t.Errorf("got %v, want what to do", err)
	}
}

// exhaustedEnv is set in the process that TestNoUserNamespaces runs where there may be no user namespace.
const exhaustedEnv = "OVERLAY_CSI_TEST_NO_NAMESPACES"

// TestNoUserNamespaces: the kernel's limit of user namespaces has the number of a full disk, and is not what an old kernel says.
func TestNoUserNamespaces(t *testing.T) {
	if os.Getenv(exhaustedEnv) == "" {
		needs.Root(t)
		again := exec.Command(os.Args[0], "-test.run=^TestNoUserNamespaces$", "-test.v")
		again.Env = append(os.Environ(), exhaustedEnv+"=1")
		all := []syscall.SysProcIDMap{{Size: 65536}}
		// A limit of its own, which others do not have.
		again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS, UidMappings: all, GidMappings: all}
		if output, err := again.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, output)
		}
		return
	}
	check(t, os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0))
	_, err := newNamespace(idMaps{mapping(), mapping(Swap{0, 1})})
	if !errdefs.IsFailedPrecondition(err) || errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "user.max_user_namespaces") {
		t.Errorf("no namespace: %v; want FailedPrecondition with the name of the sysctl, and not ENOSPC", err)
	}
	features, err := Probe(t.TempDir())
	check(t, err)
	if text := strings.Join(features.Fallbacks(), "\n"); features.IDMappedUpper || !strings.Contains(text, "user.max_user_namespaces") {
		t.Errorf("fallbacks: %s; want the sysctl in them", text)
	}
	m := &Mounter{features: Features{IDMappedUpper: true}}
	// The limit passes. A "no" would have the files of a persistent upper changed, which does not.
	if maps, err := m.MapsGroups(open(t, t.TempDir()), []Swap{{1, 2}}); maps || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("an upper can be mapped: %v, %v; want FailedPrecondition", maps, err)
	}
	m = &Mounter{features: features}
	if maps, err := m.MapsGroups(open(t, t.TempDir()), []Swap{{1, 2}}); maps || err != nil {
		t.Errorf("an upper can be mapped where the limit was there at start: %v, %v; want that its files are gone over", maps, err)
	}
}

func wantGroup(t *testing.T, path string, want uint32) {
	t.Helper()
	var stat unix.Stat_t
	check(t, unix.Lstat(path, &stat))
	if stat.Gid != want {
		t.Errorf("%s has group %d, want %d", path, stat.Gid, want)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
