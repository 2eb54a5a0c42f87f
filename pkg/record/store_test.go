package record

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

func TestSaveAndLoad(t *testing.T) {
	s := NewStore(t.TempDir(), t.TempDir(), nil)
	group := uint32(7)
	want := &Record{ID: "v", Spec: spec.Spec{Upper: spec.UpperClaim, Size: 1 << 30}, Size: 2 << 30, Made: true}
	want = want.With(Publication{Target: "/t", Pod: kubelet.Pod{UID: "u"}, Group: &group, BootID: "b", LowerDirs: []string{"/l"}})
	for range 2 {
		if err := s.Save(want); err != nil {
			t.Fatal(err)
		}
		got, err := s.Load("v")
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("loaded %+v, %v; want %+v", got, err, want)
		}
	}
	if ids, err := s.List(); err != nil || !reflect.DeepEqual(ids, []string{"v"}) {
		t.Errorf("%v, %v", ids, err)
	}
	entries, err := os.ReadDir(s.Dir("v"))
	if err != nil || len(entries) != 2 {
		t.Errorf("the volume has %v, %v; want the record and the mark alone", entries, err)
	}
}

func TestLoadErrors(t *testing.T) {
	for name, row := range map[string]struct {
		content string
		want    error
	}{
		"none":            {"", errdefs.ErrNotFound},
		"empty":           {"", ErrEmpty},
		"zeroes":          {"\x00\x00", ErrEmpty},
		"zeroes at last":  {`{"version":1,"id":"v",` + "\x00\x00", ErrEmpty},
		"a zero in it":    {"{\"version\":1,\x00id\":\"v\"}", ErrDamaged},
		"half":            {`{"version":1,"id":"v",`, ErrDamaged},
		"other version":   {`{"version":99,"id":"v","spec":{"layers":[],"upper":"pod"}}`, errdefs.ErrFailedPrecondition},
		"other volume":    {`{"version":1,"id":"w","spec":{"layers":[],"upper":"pod"}}`, errdefs.ErrFailedPrecondition},
		"wrong reference": {`{"version":1,"id":"v","spec":{"layers":["nothing"],"upper":"pod"}}`, ErrDamaged},
	} {
		t.Run(name, func(t *testing.T) {
			s := NewStore(t.TempDir(), t.TempDir(), nil)
			if name != "none" {
				write(t, s, "v", row.content)
			}
			if r, err := s.Load("v"); !errors.Is(err, row.want) || r != nil {
				t.Errorf("%+v, %v; want %v", r, err, row.want)
			}
		})
	}
}

func TestLayersInUse(t *testing.T) {
	s := NewStore(t.TempDir(), t.TempDir(), nil)
	a, b := digest.FromString("a"), digest.FromString("b")
	for id, layers := range map[string][]digest.Digest{"v": {a, b, a}, "w": {b}} {
		if err := s.Save(&Record{ID: id, Layers: layers}); err != nil {
			t.Fatal(err)
		}
	}
	write(t, s, "empty", "")
	if err := os.Mkdir(s.Dir("without"), 0o700); err != nil {
		t.Fatal(err)
	}
	got, err := s.LayersInUse()
	if want := (map[digest.Digest][]string{a: {"v"}, b: {"v", "w"}}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	// Of records that cannot be used, what still stands in them counts.
	c := digest.FromString("c")
	for id, content := range map[string]string{
		"half":  fmt.Sprintf(`{"version":1,"id":"half","layers":[%q,%q],"publ`, b, c),
		"newer": fmt.Sprintf(`{"version":99,"id":"newer","layers":{%q:true}}`, c),
		"none":  "\x00\x00",
	} {
		write(t, s, id, content)
	}
	got, err = s.LayersInUse()
	want := map[digest.Digest][]string{a: {"v"}, b: {"half", "v", "w"}, c: {"half", "newer"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("with records that cannot be used: %v, %v; want %v", got, err, want)
	}
	// Nor is an upper without a record forgotten.
	if err := os.Mkdir(filepath.Join(s.Dir("without"), "upper"), 0o700); err != nil {
		t.Fatal(err)
	}
	ids, err := s.Unreadable()
	if want := []string{"empty", "half", "newer", "none", "without"}; err != nil || !reflect.DeepEqual(ids, want) {
		t.Errorf("unreadable: %v, %v; want %v", ids, err, want)
	}
}

// TestEmptyRecord: a persistent volume whose record was emptied is damaged, never an ephemeral one that a power cut has ended.
func TestEmptyRecord(t *testing.T) {
	for kind, want := range map[spec.Policy]error{spec.UpperClaim: ErrDamaged, spec.UpperPod: ErrEmpty, spec.UpperNone: ErrEmpty} {
		for _, content := range []string{"", "\x00\x00"} {
			s := NewStore(t.TempDir(), t.TempDir(), nil)
			if err := s.Save(&Record{ID: "v", Spec: spec.Spec{Upper: kind}}); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(s.Dir("v"), dataroot.Record), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Load("v"); !errors.Is(err, want) || errors.Is(err, ErrEmpty) && errors.Is(err, ErrDamaged) {
				t.Errorf("upper %q, content %q: %v, want %v", kind, content, err, want)
			}
		}
	}
}

func write(t *testing.T, s *Store, id, content string) {
	t.Helper()
	if err := os.Mkdir(s.Dir(id), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.Dir(id), "volume.json"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
