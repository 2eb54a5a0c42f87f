package reference

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]Reference{
		"dir://models":                                 {Dir, "models", "", ""},
		"dir://models/":                                {Dir, "models", "", ""},
		"dir://models/llama/7b":                        {Dir, "models", "llama/7b", ""},
		"dir://models/llama/7b/":                       {Dir, "models", "llama/7b", ""},
		"dir://models/a%2Cb%0Ac%20d":                   {Dir, "models", "a,b\nc d", ""},
		"dir://models/a:b;c&d=e+f":                     {Dir, "models", "a:b;c&d=e+f", ""},
		"dir://models/...":                             {Dir, "models", "...", ""},
		"volume://data":                                {Volume, "data", "", ""},
		"volume://data/sub/dir":                        {Volume, "data", "sub/dir", ""},
		"cache://node-modules":                         {Cache, "node-modules", "", ""},
		"archive://images/rootfs.tar.zst":              {Archive, "images", "rootfs.tar.zst", ""},
		"oci://debian":                                 {OCI, "docker.io/library/debian:latest", "", ""},
		"oci://debian:12":                              {OCI, "docker.io/library/debian:12", "", ""},
		"oci://example.com:5000/a/b:1":                 {OCI, "example.com:5000/a/b:1", "", ""},
		"oci://example.com/a?path=/usr/share":          {OCI, "example.com/a:latest", "usr/share", ""},
		"oci://debian?platform=linux/arm/v7":           {OCI, "docker.io/library/debian:latest", "", "linux/arm/v7"},
		"oci://debian:12?platform=linux/arm64&path=/a": {OCI, "docker.io/library/debian:12", "a", "linux/arm64"},
		"oci://example.com/a@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef": {
			OCI, "example.com/a@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", "", "",
		},
	} {
		t.Run(text, func(t *testing.T) {
			got, err := Parse(text)
			if err != nil || got != want {
				t.Errorf("Parse(%q) = %+v, %v; want %+v", text, got, err, want)
			}
			again, err := Parse(got.String())
			if err != nil || again != got {
				t.Errorf("Parse(%q), the canonical form of %q, = %+v, %v", got.String(), text, again, err)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	for text, word := range map[string]string{
		"":                        "no scheme",
		"models/llama":            "no scheme",
		"/var/lib/models":         "no scheme",
		"file:///etc":             "unknown scheme",
		"dir://":                  "invalid name",
		"dir:///etc":              "invalid name",
		"dir://Models/x":          "invalid name",
		"dir://../x":              "invalid name",
		"dir://-x":                "invalid name",
		"dir://m/..":              "beneath",
		"dir://m/a/../b":          "beneath",
		"dir://m/%2e%2e/b":        "beneath",
		"dir://m/a%2F..%2F..%2Fb": "beneath",
		"dir://m/./a":             "beneath",
		"dir://m//etc":            "beneath",
		"dir://m/%2Fetc":          "beneath",
		"dir://m/a%00b":           "NUL",
		"dir://m/a%":              "%25",
		"dir://m/a?x=y":           "%3F",
		"dir://m/" + strings.Repeat("a/", 3000) + "a": "4095",
		"archive://images":                            "a file beneath",
		"cache://deps/sub":                            "as a whole",
		"cache://":                                    "invalid name",
		"cache://../other":                            "invalid name",
		"oci://":                                      "invalid reference",
		"oci://a/UPPER":                               "lowercase",
		"oci://a?path=/x&other=1":                     "parameters of an image are path and platform",
		"oci://a?path=/../x":                          "beneath",
	} {
		t.Run(fmt.Sprintf("%.60q", text), func(t *testing.T) {
			_, err := Parse(text)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), word) {
				t.Errorf("Parse(%.60q): %v; want an invalid argument with %q", text, err, word)
			}
		})
	}
}

func TestParseList(t *testing.T) {
	list, err := ParseList(" dir://m/a ,\n\tdir://m/b\r\n\ndir://m/c%2Cd ")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"dir://m/a", "dir://m/b", "dir://m/c%2Cd"}
	for i, ref := range list {
		if len(list) != len(want) || ref.String() != want[i] {
			t.Errorf("got %v, want %v", list, want)
		}
	}
	many := make([]string, MaxReferences+1)
	for i := range many {
		many[i] = fmt.Sprintf("dir://m/%d", i)
	}
	for name, row := range map[string]struct{ text, word string }{
		"twice":    {"dir://m/a,dir://m/a/", "twice"},
		"empty":    {" ,\n", "no layers"},
		"too many": {strings.Join(many, ","), "at most 500"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ParseList(row.text); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), row.word) {
				t.Errorf("%v; want an invalid argument with %q", err, row.word)
			}
		})
	}
}

func TestWithDigest(t *testing.T) {
	const id = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	ref, err := Parse("oci://debian:12?path=/usr")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ref.WithDigest(id)
	if err != nil || got != (Reference{OCI, "docker.io/library/debian:12@" + id, "usr", ""}) {
		t.Errorf("%+v, %v", got, err)
	}
}

func FuzzParseList(f *testing.F) {
	for _, seed := range []string{"dir://m/a%2Cb\nvolume://data", "oci://example.com:5000/a/b:1?path=/usr",
		"archive://r/x.tar", "dir://m/%ff", ",,\n", "dir://m/\u0085",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		list, err := ParseList(text)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("%q: %v is no invalid argument", text, err)
			}
			return
		}
		written := make([]string, len(list))
		for i, ref := range list {
			if strings.HasPrefix(ref.Path(), "/") || strings.ContainsRune(ref.Path(), 0) {
				t.Fatalf("%q: path %q", text, ref.Path())
			}
			for component := range strings.SplitSeq(ref.Path(), "/") {
				if component == ".." || component == "." || (component == "" && ref.Path() != "") {
					t.Fatalf("%q: path %q", text, ref.Path())
				}
			}
			written[i] = ref.String()
		}
		// What is written, in a list and in a state file, is read back the same.
		again, err := ParseList(strings.Join(written, ","))
		if err != nil {
			t.Fatalf("%q is written as %q: %v", text, written, err)
		}
		data, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		var loaded []Reference
		if err := json.Unmarshal(data, &loaded); err != nil {
			t.Fatal(err)
		}
		for i := range list {
			if again[i] != list[i] || loaded[i] != list[i] {
				t.Fatalf("%q: %+v, written and read %+v, loaded %+v", text, list[i], again[i], loaded[i])
			}
		}
	})
}

func TestAreResolved(t *testing.T) {
	digests := []string{"@sha256:" + strings.Repeat("a", 64), "@sha256:" + strings.Repeat("b", 64)}
	for name, c := range map[string]struct {
		refs, others string
		want         bool
	}{
		"the same":           {"dir://a/b,oci://r.example.com/i:1", "dir://a/b,oci://r.example.com/i:1", true},
		"a tag":              {"oci://r.example.com/i:1,dir://a", "oci://r.example.com/i:1" + digests[0] + ",dir://a", true},
		"a path":             {"oci://r.example.com/i:1?path=/p", "oci://r.example.com/i:1" + digests[0] + "?path=/p", true},
		"a platform":         {"oci://r.example.com/i:1?platform=linux/arm64", "oci://r.example.com/i:1" + digests[0], true},
		"a digest":           {"oci://r.example.com/i" + digests[0], "oci://r.example.com/i" + digests[0], true},
		"another digest":     {"oci://r.example.com/i" + digests[0], "oci://r.example.com/i" + digests[1], false},
		"another tag":        {"oci://r.example.com/i:1", "oci://r.example.com/i:2" + digests[0], false},
		"another path":       {"oci://r.example.com/i:1?path=/p", "oci://r.example.com/i:1" + digests[0], false},
		"another repository": {"oci://r.example.com/i:1", "oci://r.example.com/j:1" + digests[0], false},
		"another scheme":     {"oci://r.example.com/i:1", "dir://r.example.com/i", false},
		"another order":      {"dir://a,dir://b", "dir://b,dir://a", false},
		"one more":           {"dir://a", "dir://a,dir://b", false},
		"a digest too little": {
			"oci://r.example.com/i:1" + digests[0], "oci://r.example.com/i:1", false,
		},
	} {
		t.Run(name, func(t *testing.T) {
			refs, err := ParseList(c.refs)
			if err != nil {
				t.Fatal(err)
			}
			others, err := ParseList(c.others)
			if err != nil {
				t.Fatal(err)
			}
			if got := AreResolved(refs, others); got != c.want {
				t.Errorf("%t; want %t", got, c.want)
			}
		})
	}
}
