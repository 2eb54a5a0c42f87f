package spec

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestDefaultPolicy(t *testing.T) {
	for name, c := range map[string]struct {
		scope Scope
		upper string
		want  Policy
		word  string
	}{
		"inline":               {scope: Scope{Inline: true}, want: UpperPod},
		"inline none":          {scope: Scope{Inline: true}, upper: "none", want: UpperNone},
		"inline claim":         {scope: Scope{Inline: true}, upper: "claim", word: "inline"},
		"inline volume://":     {scope: Scope{Inline: true}, upper: "volume://data/x", want: UpperPodVolume},
		"RWO":                  {scope: Scope{Access: ReadWriteOnce}, want: UpperClaim},
		"RWO pod":              {scope: Scope{Access: ReadWriteOnce}, upper: "pod", want: UpperPod},
		"RWOP":                 {scope: Scope{Access: ReadWriteOncePod}, want: UpperClaim},
		"ROX":                  {scope: Scope{Access: ReadOnlyMany}, want: UpperNone},
		"ROX claim":            {scope: Scope{Access: ReadOnlyMany}, upper: "claim", word: "one node"},
		"ROX volume://":        {scope: Scope{Access: ReadOnlyMany}, upper: "volume://x", word: "read-only"},
		"single node reader":   {scope: Scope{Access: SingleNodeReaderOnly}, want: UpperNone},
		"RWX":                  {scope: Scope{Access: ReadWriteMany}, word: "upper: pod"},
		"RWX pod":              {scope: Scope{Access: ReadWriteMany}, upper: "pod", want: UpperPod},
		"RWX claim":            {scope: Scope{Access: ReadWriteMany}, upper: "claim", word: "one node"},
		"unknown":              {scope: Scope{Inline: true}, upper: "yes", word: "unknown policy"},
		"volume:// of no name": {scope: Scope{Inline: true}, upper: "volume://", word: "invalid name"},
	} {
		t.Run(name, func(t *testing.T) {
			spec, err := Parse(map[string]string{"layers": "dir://m/a", "upper": c.upper}, c.scope)
			if c.word != "" {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.word) {
					t.Errorf("%v; want an invalid argument with %q", err, c.word)
				}
				return
			}
			if err != nil || spec.Upper != c.want {
				t.Errorf("%q, %v; want %q", spec.Upper, err, c.want)
			}
			again, err := Parse(spec.Parameters(), c.scope)
			if err != nil || !again.Equal(spec) {
				t.Errorf("written as %v it is read as %+v, %v", spec.Parameters(), again, err)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add("dir://m/a\ndir://m/b", "pod", "disk", "", "", true, 0)
	f.Add("volume://data/x", "volume://data/y", "", "sizeLimit", "1Gi", false, 2)
	f.Add("oci://debian", "pod", "memory", "sizeLimit", "1.5G", true, 4)
	f.Add("dir://m/a", "claim", "", "layerOwner", "1000:2000", false, 0)
	f.Add("dir://m/a", "pod", "", "ownership", "chown", true, 0)
	f.Add("dir://m/a", "pod", "", "sizeEnforcement", "quota", true, 0)
	f.Add("cache://deps,dir://m/a", "pod", "", "commit", "deps", true, 0)
	modes := []AccessMode{ReadWriteOnce, ReadWriteOncePod, SingleNodeReaderOnly, ReadOnlyMany, ReadWriteMany}
	f.Add("", "", "", "layersFrom", "claim", false, 0)
	f.Fuzz(func(t *testing.T, layers, upper, medium, key, value string, inline bool, mode int) {
		scope := Scope{Inline: inline, Create: !inline, Access: modes[uint(mode)%uint(len(modes))]}
		parameters := map[string]string{KeyLayers: layers, KeyUpper: upper, KeyMedium: medium}
		if key != "" {
			parameters[key] = value
		}
		spec, err := Parse(parameters, scope)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("%v: %v", parameters, err)
			}
			return
		}
		if spec.Size < 0 || (spec.Medium == MediumMemory && !scope.Create && spec.Size == 0) {
			t.Fatalf("%v: %+v", parameters, spec)
		}
		if (len(spec.Layers) == 0 && parameters[KeyLayersFrom] == "") || (spec.Upper == UpperPodVolume) != (spec.UpperRef != nil) {
			t.Fatalf("%v: %+v", parameters, spec)
		}
		if len(spec.Layers) == 0 {
			return
		}
		again, err := Parse(spec.Parameters(), scope)
		if err != nil || !again.Equal(spec) {
			t.Fatalf("%v: written as %v it is read as %+v, %v", parameters, spec.Parameters(), again, err)
		}
	})
}

func TestParseCaches(t *testing.T) {
	inline := Scope{Inline: true}
	for name, c := range map[string]struct {
		keys   map[string]string
		scope  Scope
		commit string
		word   string
	}{
		"layer alone":         {map[string]string{KeyLayers: "cache://deps"}, inline, "", ""},
		"commit on the cache": {map[string]string{KeyLayers: "cache://deps,dir://m/a", KeyCommit: "deps"}, inline, "deps", ""},
		"commit on no cache":  {map[string]string{KeyLayers: "dir://m/a", KeyCommit: "deps"}, inline, "deps", ""},
		"commit on another":   {map[string]string{KeyLayers: "cache://main,dir://m/a", KeyCommit: "branch"}, inline, "branch", ""},
		"another below":       {map[string]string{KeyLayers: "dir://m/a,cache://main", KeyCommit: "branch"}, inline, "branch", ""},
		"read-only":           {map[string]string{KeyLayers: "cache://deps", KeyUpper: "none"}, inline, "", ""},
		"with a size":         {map[string]string{KeyLayers: "cache://deps", KeyCommit: "deps", KeySizeLimit: "1Gi"}, inline, "deps", ""},
		"below another layer": {map[string]string{KeyLayers: "dir://m/a,cache://deps", KeyCommit: "deps"}, inline, "", "as the first layer"},
		"twice":               {map[string]string{KeyLayers: "cache://deps,cache://deps"}, inline, "", "appears twice"},
		"in another volume":   {map[string]string{KeyLayers: "cache://deps", KeyUpper: "volume://data"}, inline, "", "may outlive"},
		"commit of nothing":   {map[string]string{KeyLayers: "cache://deps", KeyCommit: "deps", KeyUpper: "none"}, inline, "", "upper: pod"},
		"commit of a volume": {
			map[string]string{KeyLayers: "dir://m/a", KeyCommit: "deps", KeyUpper: "volume://x"}, inline, "", "upper: pod",
		},
		"commit of owners": {
			map[string]string{KeyLayers: "dir://m/a", KeyCommit: "deps", KeyOwnership: "chown"}, inline, "", "owners of files",
		},
		"empty name":           {map[string]string{KeyLayers: "dir://m/a", KeyCommit: ""}, inline, "", "invalid name"},
		"name that leads away": {map[string]string{KeyLayers: "dir://m/a", KeyCommit: "../deps"}, inline, "", "invalid name"},
		"commit in memory": {
			map[string]string{KeyLayers: "dir://m/a", KeyCommit: "deps", KeyMedium: "memory", KeySizeLimit: "1Gi"}, inline, "", "on the disk",
		},
		"layer of a static volume": {map[string]string{KeyLayers: "cache://deps"}, Scope{Access: ReadWriteOnce}, "", "inline volume"},
		"layer of a class": {
			map[string]string{KeyLayers: "cache://deps"}, Scope{Create: true, Access: ReadWriteOnce}, "", "inline volume",
		},
		"commit of a claim": {
			map[string]string{KeyLayers: "dir://m/a", KeyCommit: "deps", KeyUpper: "pod"},
			Scope{Create: true, Access: ReadWriteOnce}, "", "inline volume",
		},
	} {
		t.Run(name, func(t *testing.T) {
			spec, err := Parse(c.keys, c.scope)
			if c.word != "" {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.word) {
					t.Errorf("%v; want an invalid argument with %q", err, c.word)
				}
				return
			}
			if err != nil || spec.Commit != c.commit || !spec.UsesCaches() {
				t.Errorf("%+v, %v; want commit %q", spec, err, c.commit)
			}
			again, err := Parse(spec.Parameters(), c.scope)
			if err != nil || !again.Equal(spec) {
				t.Errorf("written as %v it is read as %+v, %v", spec.Parameters(), again, err)
			}
		})
	}
}

func TestParseLimits(t *testing.T) {
	for name, c := range map[string]struct {
		keys  map[string]string
		scope Scope
		want  Spec
		error string
	}{
		"size":               {map[string]string{KeySizeLimit: "1Gi"}, Scope{Inline: true}, Spec{Upper: UpperPod, Size: 1 << 30}, ""},
		"size with decimals": {map[string]string{KeySizeLimit: "1.5M"}, Scope{Inline: true}, Spec{Upper: UpperPod, Size: 1500000}, ""},
		"size of a class":    {map[string]string{KeySizeLimit: "1Gi"}, Scope{Create: true, Access: ReadWriteOnce}, Spec{}, "is its request"},
		"small claim":        {map[string]string{KeySizeLimit: "2Mi"}, Scope{Access: ReadWriteOnce}, Spec{}, "at least 8388608"},
		"small inline":       {map[string]string{KeySizeLimit: "2Mi"}, Scope{Inline: true}, Spec{Upper: UpperPod, Size: 2 << 20}, ""},
		"size in a sibling":  {map[string]string{KeySizeLimit: "1Gi", KeyUpper: "volume://x"}, Scope{Inline: true}, Spec{}, "another volume"},
		"size of nothing":    {map[string]string{KeySizeLimit: "1Gi", KeyUpper: "none"}, Scope{Inline: true}, Spec{}, "read-only"},
		"memory": {
			map[string]string{KeySizeLimit: "1Gi", KeyMedium: "memory"},
			Scope{Inline: true}, Spec{Upper: UpperPod, Size: 1 << 30, Medium: MediumMemory}, "",
		},
		"kept in memory": {map[string]string{KeyMedium: "memory"}, Scope{Create: true, Access: ReadWriteOnce}, Spec{}, "does not outlive"},
		"memory for a class": {
			map[string]string{KeyMedium: "memory", KeyUpper: "pod"},
			Scope{Create: true, Access: ReadWriteOnce}, Spec{Upper: UpperPod, Medium: MediumMemory}, "",
		},
		"memory with quota": {
			map[string]string{KeySizeLimit: "1Gi", KeyMedium: "memory", KeySizeEnforcement: "quota"},
			Scope{Inline: true}, Spec{}, "its own limit",
		},
		"limit of nothing": {map[string]string{KeySizeEnforcement: "quota", KeyUpper: "none"}, Scope{Inline: true}, Spec{}, "no upper"},
		"owner": {
			map[string]string{KeyLayerOwner: "0:4294967294"},
			Scope{Inline: true}, Spec{Upper: UpperPod, LayerOwner: &IDs{0, 4294967294}}, "",
		},
		"owner of no layers": {
			map[string]string{KeyLayerOwner: "1:1", KeyOwnership: "none"}, Scope{Inline: true}, Spec{}, "leaves the layers",
		},
		"walk over nothing": {map[string]string{KeyOwnership: "chown", KeyUpper: "none"}, Scope{Inline: true}, Spec{}, "read-only"},
	} {
		t.Run(name, func(t *testing.T) {
			c.keys[KeyLayers] = "dir://m/a"
			spec, err := Parse(c.keys, c.scope)
			if c.error != "" {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.error) {
					t.Errorf("%v; want %q", err, c.error)
				}
				return
			}
			spec.Layers = nil
			if err != nil || !spec.Equal(c.want) {
				t.Errorf("%+v, %v; want %+v", spec, err, c.want)
			}
		})
	}
}
