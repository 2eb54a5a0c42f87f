package overlaynode

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestSeal(t *testing.T) {
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	node := &OverlayNode{Status: Status{PublicKey: key.Public()}}
	sealed, err := node.Seal("a snapshot", []byte("hunter2"))
	if err != nil || strings.Contains(sealed, "hunter2") {
		t.Fatalf("got %q, %v", sealed, err)
	}
	if opened, err := key.Open("a snapshot", sealed); err != nil || string(opened) != "hunter2" {
		t.Errorf("got %q, %v", opened, err)
	}
	if _, err := key.Open("another snapshot", sealed); !errdefs.IsUnavailable(err) {
		t.Errorf("for another purpose: %v", err)
	}
	other, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Open("a snapshot", sealed); !errdefs.IsUnavailable(err) {
		t.Errorf("with another key: %v", err)
	}
	for _, public := range []string{"", "!", "AAAA"} {
		if _, err := (&OverlayNode{Status: Status{PublicKey: public}}).Seal("a snapshot", nil); !errdefs.IsUnavailable(err) {
			t.Errorf("key %q: %v", public, err)
		}
	}
}

// FuzzOpen opens what somebody has written into an OverlayNode.
func FuzzOpen(f *testing.F) {
	key, err := NewKey()
	if err != nil {
		f.Fatal(err)
	}
	f.Add("AAAA")
	f.Fuzz(func(t *testing.T, sealed string) {
		if opened, err := key.Open("a snapshot", sealed); err == nil {
			t.Errorf("opened %q", opened)
		}
	})
}
