package volume

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestDefaultPolicy(t *testing.T) {
	for name, c := range map[string]struct {
		usage Usage
		upper string
		want  Policy
		word  string
	}{
		"inline":               {usage: Usage{Inline: true}, want: UpperPod},
		"inline none":          {usage: Usage{Inline: true}, upper: "none", want: UpperNone},
		"inline volume":        {usage: Usage{Inline: true}, upper: "volume", word: "inline"},
		"inline volume://":     {usage: Usage{Inline: true}, upper: "volume://data/x", want: UpperPodVolume},
		"RWO":                  {usage: Usage{Access: SingleNode}, want: UpperVolume},
		"RWO pod":              {usage: Usage{Access: SingleNode}, upper: "pod", want: UpperPod},
		"RWOP":                 {usage: Usage{Access: SinglePod}, want: UpperVolume},
		"ROX":                  {usage: Usage{Access: ManyReaders}, want: UpperNone},
		"ROX volume":           {usage: Usage{Access: ManyReaders}, upper: "volume", word: "one node"},
		"ROX volume://":        {usage: Usage{Access: ManyReaders}, upper: "volume://x", word: "only read"},
		"single node reader":   {usage: Usage{Access: SingleNodeReader}, want: UpperNone},
		"RWX":                  {usage: Usage{Access: ManyWriters}, word: "upper: pod"},
		"RWX pod":              {usage: Usage{Access: ManyWriters}, upper: "pod", want: UpperPod},
		"RWX volume":           {usage: Usage{Access: ManyWriters}, upper: "volume", word: "one node"},
		"unknown":              {usage: Usage{Inline: true}, upper: "yes", word: "unknown policy"},
		"volume:// of no name": {usage: Usage{Inline: true}, upper: "volume://", word: "no name"},
	} {
		spec, err := ParseSpec(map[string]string{"layers": "dir://m/a", "upper": c.upper}, c.usage)
		if c.word != "" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.word) {
				t.Errorf("%s: %v; want an invalid argument with %q", name, err, c.word)
			}
			continue
		}
		if err != nil || spec.Upper != c.want {
			t.Errorf("%s: %q, %v; want %q", name, spec.Upper, err, c.want)
		}
		again, err := ParseSpec(spec.Parameters(), c.usage)
		if err != nil || !again.Equal(spec) {
			t.Errorf("%s: written as %v it is read as %+v, %v", name, spec.Parameters(), again, err)
		}
	}
}

func FuzzParseSpec(f *testing.F) {
	f.Add("dir://m/a\ndir://m/b", "pod", "disk", "", true, 0)
	f.Add("volume://data/x", "volume://data/y", "", "sizeLimit", false, 2)
	f.Add("oci://debian", "none", "memory", "x", false, 4)
	modes := []Access{SingleNode, SinglePod, SingleNodeReader, ManyReaders, ManyWriters}
	f.Add("", "", "", "layersFrom", false, 0)
	f.Fuzz(func(t *testing.T, layers, upper, medium, key string, inline bool, mode int) {
		usage := Usage{Inline: inline, Create: !inline, Access: modes[uint(mode)%uint(len(modes))]}
		parameters := map[string]string{KeyLayers: layers, KeyUpper: upper, KeyMedium: medium}
		if key != "" {
			parameters[key] = "1"
		}
		spec, err := ParseSpec(parameters, usage)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
				t.Fatalf("%v: %v", parameters, err)
			}
			return
		}
		if len(spec.Layers) == 0 || (spec.Upper == UpperPodVolume) != (spec.UpperRef != nil) {
			t.Fatalf("%v: %+v", parameters, spec)
		}
		again, err := ParseSpec(spec.Parameters(), usage)
		if err != nil || !again.Equal(spec) {
			t.Fatalf("%v: written as %v it is read as %+v, %v", parameters, spec.Parameters(), again, err)
		}
	})
}

func TestCheckIDAndTarget(t *testing.T) {
	for _, id := range []string{"pvc-1", "csi-0123", "a b", "ünï", "a..b", strings.Repeat("x", 128)} {
		if err := CheckID(id); err != nil {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, id := range []string{"", ".", "..", ".hidden", "a/b", "/", "a\x00", "a\nb", "\x7f", "\xff", strings.Repeat("x", 129)} {
		if err := CheckID(id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, target := range []string{"", "/", "a", "./a", "/a/../b", "/a//b", "/a/", "/a\x00", "/" + strings.Repeat("x", 5000)} {
		if err := CheckTarget(target); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.20q: %v", target, err)
		}
	}
}
