// Package layer turns layer references, what a user writes to name a layer, into read-only directories.
package layer

import (
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// Scheme is the kind of a layer reference.
type Scheme string

// The schemes of layer references.
const (
	OCI     Scheme = "oci"     // oci://registry/repository:tag or @digest, with ?path=/directory
	Archive Scheme = "archive" // archive://ROOT/file.tar
	Dir     Scheme = "dir"     // dir://ROOT/directory
	Volume  Scheme = "volume"  // volume://NAME/directory
)

// maxReference is the longest reference in bytes: a path of PATH_MAX, each byte written as %XX, and a name.
const maxReference = 3*4096 + 256

// Reference names one layer. The zero value names none; Parse makes the others.
type Reference struct {
	scheme Scheme
	// name is the layer root, the pod's volume, or the image with its tag or digest.
	name string
	// path lies beneath what name stands for: clean, relative, unescaped, "" for the whole of it.
	path string
}

// namePattern is what layer roots and pod volumes may be called: a DNS label, with dots for PersistentVolume-like names.
var namePattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)

// Parse reads one reference. In a path, %XX stands for a byte, so that commas, newlines and leading spaces can be
// named (%2C, %0A, %20); `..`, empty components and NUL are refused. The error is an InvalidArgument that shows the
// right form.
func Parse(text string) (Reference, error) {
	if len(text) > maxReference {
		return Reference{}, fmt.Errorf("%w: layer reference of %d bytes: at most %d", errdefs.ErrInvalidArgument, len(text), maxReference)
	}
	scheme, rest, found := strings.Cut(text, "://")
	if !found {
		return Reference{}, malformed(text, "it has no scheme: write dir://ROOT/path, volume://NAME/path, oci://registry/repository:tag or archive://ROOT/file.tar")
	}
	switch Scheme(scheme) {
	case OCI:
		return parseImage(text, rest)
	case Archive, Dir, Volume:
		return parsePath(text, Scheme(scheme), rest)
	}
	return Reference{}, malformed(text, fmt.Sprintf("unknown scheme %q: there are dir, volume, oci and archive", scheme))
}

// ParseList reads references that stand one a line or between commas, the topmost first. Spaces around them and empty
// lines are passed over. An empty list is an InvalidArgument.
func ParseList(text string) ([]Reference, error) {
	var list []Reference
	seen := map[Reference]bool{}
	for field := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == '\n' || r == ',' }) {
		field = strings.TrimSpace(field)
		if field == "" {
			continue
		}
		ref, err := Parse(field)
		if err != nil {
			return nil, err
		}
		if seen[ref] {
			return nil, fmt.Errorf("%w: layer %s is named twice: overlayfs takes a directory once", errdefs.ErrInvalidArgument, ref)
		}
		seen[ref] = true
		list = append(list, ref)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%w: no layers: name at least one, such as dir://ROOT/path", errdefs.ErrInvalidArgument)
	}
	return list, nil
}

func parsePath(text string, scheme Scheme, rest string) (Reference, error) {
	if strings.ContainsAny(rest, "?#") {
		return Reference{}, malformed(text, "a path has no ? and no #: write %3F and %23")
	}
	name, escaped, _ := strings.Cut(rest, "/")
	if !namePattern.MatchString(name) {
		return Reference{}, malformed(text, fmt.Sprintf("%q is no name: lower-case letters, digits, '-' and '.' before the first '/'", name))
	}
	path, err := url.PathUnescape(escaped)
	if err != nil {
		return Reference{}, malformed(text, "a percent sign is written %25: "+err.Error())
	}
	path = strings.TrimSuffix(path, "/")
	if err := checkPath(path); err != nil {
		return Reference{}, malformed(text, err.Error())
	}
	if scheme == Archive && path == "" {
		return Reference{}, malformed(text, "an archive is a file beneath its layer root: archive://ROOT/file.tar")
	}
	return Reference{scheme: scheme, name: name, path: path}, nil
}

func parseImage(text, rest string) (Reference, error) {
	image, query, hasQuery := strings.Cut(rest, "?")
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return Reference{}, malformed(text, err.Error())
	}
	ref := Reference{scheme: OCI, name: reference.TagNameOnly(named).String()}
	if !hasQuery {
		return ref, nil
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return Reference{}, malformed(text, err.Error())
	}
	if len(values) != 1 || len(values["path"]) != 1 {
		return Reference{}, malformed(text, "the only parameter of an image is path: ?path=/directory")
	}
	ref.path = strings.Trim(values.Get("path"), "/")
	if err := checkPath(ref.path); err != nil {
		return Reference{}, malformed(text, err.Error())
	}
	return ref, nil
}

// checkPath refuses what cannot be a path beneath something. Resolution is beneath its root all the same (openat2):
// this check is there for the clear message, before anything is touched.
func checkPath(path string) error {
	if path == "" {
		return nil
	}
	if len(path) > 4095 {
		return fmt.Errorf("a path of %d bytes: at most 4095", len(path))
	}
	if strings.ContainsRune(path, 0) {
		return fmt.Errorf("a path has no NUL byte")
	}
	for component := range strings.SplitSeq(path, "/") {
		switch component {
		case "", ".", "..":
			return fmt.Errorf("the path must stay beneath its root, written without empty components, '.' and '..'")
		}
	}
	return nil
}

func malformed(text, why string) error {
	if len(text) > 256 {
		text = text[:256] + "…"
	}
	return fmt.Errorf("%w: layer reference %q: %s", errdefs.ErrInvalidArgument, text, why)
}

// Scheme is the kind of the reference.
func (r Reference) Scheme() Scheme { return r.scheme }

// Name is the layer root, the pod's volume, or the image in full (docker.io/library/debian:12).
func (r Reference) Name() string { return r.name }

// Path lies beneath what Name stands for: relative and clean, "" for the whole of it.
func (r Reference) Path() string { return r.path }

// String is the reference in its one canonical form, which Parse reads back to the same value.
func (r Reference) String() string {
	switch {
	case r.scheme == "":
		return ""
	case r.scheme == OCI && r.path != "":
		return "oci://" + r.name + "?" + url.Values{"path": {"/" + r.path}}.Encode()
	case r.path == "":
		return string(r.scheme) + "://" + r.name
	}
	return string(r.scheme) + "://" + r.name + "/" + escapePath(r.path)
}

// escapePath escapes what a path in a list of references must not have plain: the separators of the list, white space
// that would be trimmed, what begins an escape, a query or a fragment, and what is not printable text.
func escapePath(path string) string {
	var escaped strings.Builder
	for len(path) > 0 {
		r, size := utf8.DecodeRuneInString(path)
		if (r == utf8.RuneError && size == 1) || !unicode.IsPrint(r) || strings.ContainsRune("%,?# ", r) {
			for i := range size {
				fmt.Fprintf(&escaped, "%%%02X", path[i])
			}
		} else {
			escaped.WriteString(path[:size])
		}
		path = path[size:]
	}
	return escaped.String()
}

// MarshalText is String, for state files (encoding.TextMarshaler).
func (r Reference) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText is Parse (encoding.TextUnmarshaler).
func (r *Reference) UnmarshalText(text []byte) error {
	parsed, err := Parse(string(text))
	if err != nil {
		return err
	}
	*r = parsed
	return nil
}
