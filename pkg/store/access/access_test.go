package access

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/needs"
)

const image = digest.Digest("sha256:0123")

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestPolicies has an image that the operator preloaded, one that a login was accepted for, and one that is public.
func TestPolicies(t *testing.T) {
	const preloaded, private, public = digest.Digest("sha256:1"), digest.Digest("sha256:2"), digest.Digest("sha256:3")
	path := filepath.Join(t.TempDir(), "access")
	for policy, wantPreloaded := range map[Policy]bool{
		NeverVerify: true, NeverVerifyPreloadedImages: true, NeverVerifyAllowlistedImages: true, AlwaysVerify: false,
	} {
		t.Run(string(policy), func(t *testing.T) {
			v := NewVerifier(path, Config{Policy: policy, Allowlist: []string{"host/team/*"}})
			isPreloaded := func(image digest.Digest, repository string) bool {
				return image == preloaded && (repository == "host/team/a" || repository == "host/other/a")
			}
			must(t, v.AcceptImage(private, "host/team/a", "login"))
			must(t, v.AcceptImage(public, "host/team/a", Anonymous))
			never := policy == NeverVerify
			for name, c := range map[string]struct {
				image      digest.Digest
				repository string
				logins     []string
				want       bool
			}{
				"preloaded":                  {preloaded, "host/team/a", nil, wantPreloaded},
				"preloaded, not in the list": {preloaded, "host/other/a", nil, never || policy == NeverVerifyPreloadedImages},
				"preloaded, other name":      {preloaded, "host/team/b", []string{"login"}, never},
				"login":                      {private, "host/team/a", []string{"wrong", "login"}, true},
				"another login":              {private, "host/team/a", []string{"wrong"}, never},
				"no login":                   {private, "host/team/a", nil, never},
				"login, other repository":    {private, "host/team/b", []string{"login"}, never},
				"public":                     {public, "host/team/a", nil, true},
				"public, with a login":       {public, "host/team/a", []string{"login"}, true},
				"public, other registry":     {public, "evil/team/a", nil, never},
				"unknown":                    {image, "host/team/a", []string{"login"}, never},
			} {
				t.Run(name, func(t *testing.T) {
					if got := v.MayUseImage(c.image, Tenant{"host", c.repository, c.logins}, isPreloaded(c.image, c.repository)); got != c.want {
						t.Errorf("MayUseImage is %t", got)
					}
				})
			}
		})
	}
}

// TestHolders says who may use a layer that came from host/a with the login "login".
func TestHolders(t *testing.T) {
	v := NewVerifier(filepath.Join(t.TempDir(), "access"), Config{Policy: AlwaysVerify})
	holders := v.LayerHolders(Tenant{"host", "host/a", nil}, "login")
	for name, c := range map[string]struct {
		tenant Tenant
		want   bool
	}{
		"same repository":                   {Tenant{"host", "host/a", []string{"other"}}, true},
		"same login":                        {Tenant{"host", "host/b", []string{"login"}}, true},
		"same login for another registry":   {Tenant{"evil", "evil/a", []string{"login"}}, false},
		"another repository":                {Tenant{"host", "host/b", []string{"other"}}, false},
		"another repository, without login": {Tenant{"host", "host/b", nil}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := v.MayUseLayer(holders, c.tenant); got != c.want {
				t.Errorf("MayUseLayer is %t", got)
			}
			if v.MayUseLayer(nil, c.tenant) {
				t.Error("a layer without holders may be used")
			}
			if public := AddHolders(holders, v.LayerHolders(Tenant{}, Anonymous)); !v.MayUseLayer(public, c.tenant) {
				t.Error("a public layer may not be used")
			}
		})
	}
	public := v.LayerHolders(Tenant{}, Anonymous)
	elsewhere := v.LayerHolders(Tenant{"host", "host/b", nil}, "login")
	for name, c := range map[string]struct{ one, other, want []ID }{
		"both public":           {public, public, public},
		"one public":            {public, holders, holders},
		"the other public":      {holders, public, holders},
		"same login":            {holders, elsewhere, holders[1:]},
		"nothing in common":     {holders, v.LayerHolders(Tenant{"host", "host/b", nil}, "other"), nil},
		"same repository again": {holders, holders, holders},
	} {
		if got := v.CommonHolders(c.one, c.other); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q instead of %q", name, got, c.want)
		}
	}
	var many []ID
	for i := range maxHolders + 10 {
		many = AddHolders(many, []ID{ID(fmt.Sprint(i))})
	}
	if len(many) != maxHolders || many[0] != "10" {
		t.Errorf("%d holders, the first is %s", len(many), many[0])
	}
}

// TestTableOnDisk reads the table again, damages it, and fills it.
func TestTableOnDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access")
	config, tenant := Config{Policy: AlwaysVerify}, Tenant{"host", "host/a", []string{"secret"}}
	accept := func() { must(t, NewVerifier(path, config).AcceptImage(image, tenant.Repository, "secret")) }
	may := func() bool { return NewVerifier(path, config).MayUseImage(image, tenant, false) }
	accept()
	if !may() {
		t.Error("it is forgotten")
	}
	for name, damage := range map[string]func(data []byte) []byte{
		"empty":            func([]byte) []byte { return nil },
		"half a salt":      func(data []byte) []byte { return data[:saltSize/2] },
		"other salt":       func(data []byte) []byte { data[0] ^= 1; return data },
		"half an ID":       func(data []byte) []byte { return data[:saltSize+idSize/2] },
		"zeros at the end": func(data []byte) []byte { clear(data[saltSize:]); return data },
	} {
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(path)
			must(t, err)
			must(t, os.WriteFile(path, damage(data), 0o600))
			if may() {
				t.Error("a damaged table accepts")
			}
			accept()
			if !may() {
				t.Error("the table does not work again")
			}
		})
	}
	must(t, os.Remove(path))
	if may() {
		t.Error("a table that is gone accepts")
	}
	v := NewVerifier(path, config)
	for i := range maxIDs + 1 {
		v.table.addLocked(v.table.hash(fmt.Sprint(i)))
		if len(v.table.order) == maxIDs {
			break
		}
	}
	must(t, v.table.write())
	must(t, v.AcceptImage(image, tenant.Repository, "secret"))
	info, err := os.Stat(path)
	must(t, err)
	if want := int64(saltSize + (maxIDs/2+1)*idSize); info.Size() != want || !may() {
		t.Errorf("the file has %d bytes, want %d", info.Size(), want)
	}
}

// TestTableOnAReadOnlyDisk begins where the table cannot be written. It works in memory, and is stored once it can be.
func TestTableOnAReadOnlyDisk(t *testing.T) {
	needs.Root(t)
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_RDONLY, ""))
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	path := filepath.Join(dir, "access")
	config, tenant := Config{Policy: AlwaysVerify}, Tenant{"host", "host/a", []string{"secret"}}
	v := NewVerifier(path, config)
	if err := v.AcceptImage(image, tenant.Repository, "secret"); !errors.Is(err, unix.EROFS) || !v.MayUseImage(image, tenant, false) {
		t.Errorf("the error is %v; the image may be used: %t", err, v.MayUseImage(image, tenant, false))
	}
	must(t, unix.Mount("", dir, "", unix.MS_REMOUNT, ""))
	must(t, v.AcceptImage(image, "host/b", "secret"))
	if !NewVerifier(path, config).MayUseImage(image, tenant, false) {
		t.Error("what was accepted while the disk was read-only is forgotten")
	}
}
