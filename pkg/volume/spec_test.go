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
		"volume:// of no name": {usage: Usage{Inline: true}, upper: "volume://", word: "invalid name"},
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
	f.Add("dir://m/a\ndir://m/b", "pod", "disk", "", "", true, 0)
	f.Add("volume://data/x", "volume://data/y", "", "sizeLimit", "1Gi", false, 2)
	f.Add("oci://debian", "pod", "memory", "sizeLimit", "1.5G", true, 4)
	f.Add("dir://m/a", "volume", "", "layerOwner", "1000:2000", false, 0)
	f.Add("dir://m/a", "pod", "", "ownership", "walk", true, 0)
	f.Add("dir://m/a", "pod", "", "limit", "quota", true, 0)
	modes := []Access{SingleNode, SinglePod, SingleNodeReader, ManyReaders, ManyWriters}
	f.Add("", "", "", "layersFrom", "claim", false, 0)
	f.Fuzz(func(t *testing.T, layers, upper, medium, key, value string, inline bool, mode int) {
		usage := Usage{Inline: inline, Create: !inline, Access: modes[uint(mode)%uint(len(modes))]}
		parameters := map[string]string{KeyLayers: layers, KeyUpper: upper, KeyMedium: medium}
		if key != "" {
			parameters[key] = value
		}
		spec, err := ParseSpec(parameters, usage)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("%v: %v", parameters, err)
			}
			return
		}
		if spec.Size < 0 || (spec.Medium == MediumMemory && !usage.Create && spec.Size == 0) {
			t.Fatalf("%v: %+v", parameters, spec)
		}
		if (len(spec.Layers) == 0 && parameters[KeyLayersFrom] == "") || (spec.Upper == UpperPodVolume) != (spec.UpperRef != nil) {
			t.Fatalf("%v: %+v", parameters, spec)
		}
		if len(spec.Layers) == 0 {
			return
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

func TestParseLimits(t *testing.T) {
	for name, c := range map[string]struct {
		keys  map[string]string
		usage Usage
		want  Spec
		error string
	}{
		"size":               {map[string]string{KeySizeLimit: "1Gi"}, Usage{Inline: true}, Spec{Upper: UpperPod, Size: 1 << 30}, ""},
		"size with decimals": {map[string]string{KeySizeLimit: "1.5M"}, Usage{Inline: true}, Spec{Upper: UpperPod, Size: 1500000}, ""},
		"size of a class":    {map[string]string{KeySizeLimit: "1Gi"}, Usage{Create: true, Access: SingleNode}, Spec{}, "is its request"},
		"small claim":        {map[string]string{KeySizeLimit: "2Mi"}, Usage{Access: SingleNode}, Spec{}, "at least 8388608"},
		"small inline":       {map[string]string{KeySizeLimit: "2Mi"}, Usage{Inline: true}, Spec{Upper: UpperPod, Size: 2 << 20}, ""},
		"size in a sibling":  {map[string]string{KeySizeLimit: "1Gi", KeyUpper: "volume://x"}, Usage{Inline: true}, Spec{}, "another volume"},
		"size of nothing":    {map[string]string{KeySizeLimit: "1Gi", KeyUpper: "none"}, Usage{Inline: true}, Spec{}, "only read"},
		"memory":             {map[string]string{KeySizeLimit: "1Gi", KeyMedium: "memory"}, Usage{Inline: true}, Spec{Upper: UpperPod, Size: 1 << 30, Medium: MediumMemory}, ""},
		"kept in memory":     {map[string]string{KeyMedium: "memory"}, Usage{Create: true, Access: SingleNode}, Spec{}, "does not outlive"},
		"memory for a class": {map[string]string{KeyMedium: "memory", KeyUpper: "pod"}, Usage{Create: true, Access: SingleNode}, Spec{Upper: UpperPod, Medium: MediumMemory}, ""},
		"memory with quota":  {map[string]string{KeySizeLimit: "1Gi", KeyMedium: "memory", KeyLimit: "quota"}, Usage{Inline: true}, Spec{}, "its own limit"},
		"limit of nothing":   {map[string]string{KeyLimit: "quota", KeyUpper: "none"}, Usage{Inline: true}, Spec{}, "no upper"},
		"owner":              {map[string]string{KeyLayerOwner: "0:4294967294"}, Usage{Inline: true}, Spec{Upper: UpperPod, LayerOwner: &Owner{0, 4294967294}}, ""},
		"owner of no layers": {map[string]string{KeyLayerOwner: "1:1", KeyOwnership: "none"}, Usage{Inline: true}, Spec{}, "leaves the layers"},
		"walk over nothing":  {map[string]string{KeyOwnership: "walk", KeyUpper: "none"}, Usage{Inline: true}, Spec{}, "only read"},
	} {
		c.keys[KeyLayers] = "dir://m/a"
		spec, err := ParseSpec(c.keys, c.usage)
		if c.error != "" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.error) {
				t.Errorf("%s: %v; want %q", name, err, c.error)
			}
			continue
		}
		spec.Layers = nil
		if err != nil || !spec.Equal(c.want) {
			t.Errorf("%s: %+v, %v; want %+v", name, spec, err, c.want)
		}
	}
}
