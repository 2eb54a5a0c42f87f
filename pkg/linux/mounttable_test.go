package linux

import (
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
)

// TestLongMountsAreBounded: pods choose how many mounts have long paths. Those of others are found all the same.
func TestLongMountsAreBounded(t *testing.T) {
	const line = 1 << 20
	table := strings.Repeat("22 21 0:42 / /v"+strings.Repeat("x", line)+" rw - tmpfs tmpfs rw\n", 64) +
		strings.Repeat("23 21 0:43 / /v rw - overlay overlay rw,lowerdir="+strings.Repeat("y", line)+"\n", 8) +
		"24 21 0:44 / /last rw - tmpfs tmpfs rw\n"
	mounts, err := parseMounts(strings.NewReader(table), nil)
	must(t, err)
	paths, views := 0, 0
	for _, mount := range mounts {
		paths += len(mount.Mountpoint)
		if mount.ID == 23 {
			views++
		}
	}
	if paths > longMountPaths+line || views != 8 || mounts[len(mounts)-1].ID != 24 {
		t.Errorf("%d bytes of paths, %d views, the last mount is %d", paths, views, mounts[len(mounts)-1].ID)
	}
}

// TestMountsOfAnyLength reads a mount table with lines that are longer than any buffer.
func TestMountsOfAnyLength(t *testing.T) {
	const before, after = "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n", "23 1 0:5 / /a\\040b rw - tmpfs tmpfs rw"
	path := strings.Repeat("/"+strings.Repeat("x", 255), 1000)
	for name, c := range map[string]struct {
		line string
		want mountinfo.Info
	}{
		"long path": {
			"22 21 0:42 " + path + `\040y` + " /v" + path + `\012y` + " ro,noexec shared:2 master:1 - tmpfs tmpfs rw,size=1k",
			mountinfo.Info{
				ID: 22, Parent: 21, Minor: 42, Root: path + " y", Mountpoint: "/v" + path + "\ny", Options: "ro,noexec",
				Optional: "shared:2 master:1", FSType: "tmpfs", Source: "tmpfs", VFSOptions: "rw,size=1k",
			},
		},
		"many layers": {
			"22 21 0:42 / /v rw - overlay overlay rw,lowerdir=" + path,
			mountinfo.Info{
				ID: 22, Parent: 21, Minor: 42, Root: "/", Mountpoint: "/v", Options: "rw", FSType: "overlay", Source: "overlay",
				VFSOptions: "rw,lowerdir=" + path,
			},
		},
		"too long": {line: "22 21 0:42 / /v" + strings.Repeat("x", longMountLine) + " rw - tmpfs tmpfs rw"},
		"short": {
			"22 21 0:42 / /v rw - tmpfs tmpfs rw",
			mountinfo.Info{
				ID: 22, Parent: 21, Minor: 42, Root: "/", Mountpoint: "/v", Options: "rw", FSType: "tmpfs", Source: "tmpfs", VFSOptions: "rw",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			mounts, err := parseMounts(strings.NewReader(before+c.line+"\n"+after), nil)
			if err != nil {
				t.Fatal(err)
			}
			want := 3
			if c.want.ID == 0 {
				want = 2
			}
			if len(mounts) != want || mounts[0].ID != 21 || mounts[want-1].Mountpoint != "/a b" {
				t.Fatalf("%d mounts, want %d", len(mounts), want)
			}
			if want == 3 && *mounts[1] != c.want {
				t.Errorf("got %.300v, want %.300v", *mounts[1], c.want)
			}
			skipped, err := parseMounts(strings.NewReader(before+c.line+"\n"+after), func(mount *mountinfo.Info) (skip, stop bool) {
				return mount.ID == 22, false
			})
			if err != nil || len(skipped) != 2 {
				t.Errorf("%d mounts, %v; want 2", len(skipped), err)
			}
		})
	}
}
