package reference

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	dockerref "github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Scheme says what a reference names.
type Scheme string

// The schemes of layer references.
const (
	OCI     Scheme = "oci"     // oci://registry/repository:tag or @digest, with ?path=/directory
	Archive Scheme = "archive" // archive://ROOT/file.tar
	Dir     Scheme = "dir"     // dir://ROOT/directory
	Volume  Scheme = "volume"  // volume://NAME/directory
	Cache   Scheme = "cache"   // cache://NAME
)

// MaxReferences is the largest number of layers of a volume: overlayfs takes 500 lower directories (OVL_MAX_STACK in
// fs/overlayfs/params.h).
const MaxReferences = 500

const (
	// maxLength is the length of the longest reference in bytes: a path of PATH_MAX with each byte written as %XX, and a name.
	maxLength = 3*maxPath + 256
	// maxPath is PATH_MAX.
	maxPath = 4096
	// maxShown is how much of a malformed reference an error shows, in bytes.
	maxShown = 256
)

// Reference names one layer. The zero value names none; Parse returns the others.
type Reference struct {
	scheme Scheme
	// name is the layer root, the pod's volume, the cache, or the image with its tag or digest.
	name string
	// path is beneath name: relative, clean, unescaped, "" for all of it.
	path string
	// platform is that of an image, "" for the node's own.
	platform string
}

// platformPattern is os/architecture or os/architecture/variant.
var platformPattern = regexp.MustCompile(`^[a-z0-9]{1,32}/[a-z0-9]{1,32}(/[a-z0-9.]{1,32})?$`)

// Digests are the image digests that references to images and archives were resolved to, by the reference's text.
type Digests map[string]digest.Digest

// namePattern is a DNS label with dots, as in the names of PersistentVolumes.
var namePattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)

// IsName reports whether a layer root, a pod's volume or a cache may have this name.
func IsName(name string) bool { return namePattern.MatchString(name) }

// Parse parses one reference. In a path, %XX stands for a byte, so that commas, newlines and leading spaces can be
// written (%2C, %0A, %20). It returns ErrInvalidArgument if the reference is malformed, or if its path has an empty
// component, "." or "..".
func Parse(text string) (Reference, error) {
	if len(text) > maxLength {
		return Reference{}, fmt.Errorf("%w: a layer reference has %d bytes, the maximum is %d", errdefs.ErrInvalidArgument, len(text), maxLength)
	}
	scheme, rest, found := strings.Cut(text, "://")
	if !found {
		return Reference{}, malformed(text, "it has no scheme; "+
			"write dir://ROOT/path, volume://NAME/path, oci://registry/repository:tag, archive://ROOT/file.tar or cache://NAME")
	}
	switch Scheme(scheme) {
	case OCI:
		return parseImage(text, rest)
	case Archive, Dir, Volume, Cache:
		return parsePath(text, Scheme(scheme), rest)
	}
	return Reference{}, malformed(text, fmt.Sprintf("unknown scheme %q; the schemes are dir, volume, oci, archive and cache", scheme))
}

// ParseList parses a list of references that are separated by commas or newlines, the topmost layer first. It ignores
// empty lines and spaces around a reference. It returns ErrInvalidArgument if the list is empty, is longer than
// MaxReferences, or has one reference twice.
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
			return nil, fmt.Errorf("%w: layer %s appears twice; overlayfs takes each directory once", errdefs.ErrInvalidArgument, ref)
		}
		seen[ref] = true
		list = append(list, ref)
	}
	switch {
	case len(list) == 0:
		return nil, fmt.Errorf("%w: no layers; name at least one, such as dir://ROOT/path", errdefs.ErrInvalidArgument)
	case len(list) > MaxReferences:
		return nil, fmt.Errorf("%w: %d layers; overlayfs takes at most %d", errdefs.ErrInvalidArgument, len(list), MaxReferences)
	}
	return list, nil
}

func parsePath(text string, scheme Scheme, rest string) (Reference, error) {
	if strings.ContainsAny(rest, "?#") {
		return Reference{}, malformed(text, "? and # in a path are written %3F and %23")
	}
	name, escaped, _ := strings.Cut(rest, "/")
	if !IsName(name) {
		return Reference{}, malformed(text, fmt.Sprintf("invalid name %q; a name has lower-case letters, digits, '-' and '.'", name))
	}
	path, err := url.PathUnescape(escaped)
	if err != nil {
		return Reference{}, malformed(text, err.Error()+"; a percent sign is written %25")
	}
	path = strings.TrimSuffix(path, "/")
	if err := checkPath(path); err != nil {
		return Reference{}, malformed(text, err.Error())
	}
	if scheme == Archive && path == "" {
		return Reference{}, malformed(text, "an archive is a file beneath its layer root; write archive://ROOT/file.tar")
	}
	if scheme == Cache && path != "" {
		return Reference{}, malformed(text, "a cache is a layer as a whole; write cache://NAME")
	}
	return Reference{scheme: scheme, name: name, path: path}, nil
}

func parseImage(text, rest string) (Reference, error) {
	image, query, hasQuery := strings.Cut(rest, "?")
	named, err := dockerref.ParseNormalizedNamed(image)
	if err != nil {
		return Reference{}, malformed(text, err.Error())
	}
	ref := Reference{scheme: OCI, name: dockerref.TagNameOnly(named).String()}
	if !hasQuery {
		return ref, nil
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return Reference{}, malformed(text, err.Error())
	}
	if !areImageParameters(values) {
		return Reference{}, malformed(text, "the parameters of an image are path and platform, as in ?path=/directory&platform=linux/arm64")
	}
	if ref.platform = values.Get("platform"); values.Has("platform") && !platformPattern.MatchString(ref.platform) {
		return Reference{}, malformed(text, "a platform is os/architecture or os/architecture/variant, as in ?platform=linux/arm64")
	}
	ref.path = strings.Trim(values.Get("path"), "/")
	if err := checkPath(ref.path); err != nil {
		return Reference{}, malformed(text, err.Error())
	}
	return ref, nil
}

// areImageParameters reports whether a query has one or both of the parameters of an image, each once.
func areImageParameters(values url.Values) bool {
	for key, list := range values {
		if key != "path" && key != "platform" || len(list) != 1 {
			return false
		}
	}
	return len(values) > 0
}

// checkPath refuses a path that cannot be beneath a directory. The kernel refuses it too when the path is resolved
// (openat2); this check exists for the clear message.
func checkPath(path string) error {
	if path == "" {
		return nil
	}
	if len(path) >= maxPath {
		return fmt.Errorf("the path has %d bytes, the maximum is %d", len(path), maxPath-1)
	}
	if strings.ContainsRune(path, 0) {
		return errors.New("the path has a NUL byte")
	}
	for component := range strings.SplitSeq(path, "/") {
		switch component {
		case "", ".", "..":
			return errors.New("the path must be beneath its root; write it without empty components, '.' and '..'")
		}
	}
	return nil
}

func malformed(text, why string) error {
	if len(text) > maxShown {
		text = text[:maxShown] + "…"
	}
	return fmt.Errorf("%w: layer reference %q: %s", errdefs.ErrInvalidArgument, text, why)
}

// Scheme returns the scheme of the reference.
func (r Reference) Scheme() Scheme { return r.scheme }

// Name returns the name of the layer root, of the pod's volume or of the cache, or the full name of the image
// (docker.io/library/debian:12).
func (r Reference) Name() string { return r.name }

// Path returns the path beneath Name: relative and clean, "" for all of it.
func (r Reference) Path() string { return r.path }

// Platform returns the platform of an image, for example "linux/arm64". It is "" for the platform of the node.
func (r Reference) Platform() string { return r.platform }

// WithDigest returns the reference to an image with a digest added to its name, or in place of the digest there. The digest is that of the
// manifest for the reference's platform, so that the result has none.
func (r Reference) WithDigest(id digest.Digest) (Reference, error) {
	named, err := dockerref.ParseNormalizedNamed(r.name)
	if err != nil {
		return Reference{}, malformed(r.String(), err.Error())
	}
	canonical, err := dockerref.WithDigest(named, id)
	if err != nil {
		return Reference{}, malformed(r.String(), err.Error())
	}
	r.name, r.platform = canonical.String(), ""
	return r, nil
}

// isResolved reports whether other is the same reference, or that with a digest as WithDigest adds it.
func (r Reference) isResolved(other Reference) bool {
	if r == other || r.scheme != OCI || other.scheme != OCI {
		return r == other
	}
	if _, ok := r.digest(); ok && r.platform == "" {
		return false
	}
	id, ok := other.digest()
	if !ok {
		return false
	}
	resolved, err := r.WithDigest(id)
	return err == nil && resolved == other
}

// HasDigest reports whether the reference is to an image with a digest.
func (r Reference) HasDigest() bool {
	_, ok := r.digest()
	return r.scheme == OCI && ok
}

// digest returns the digest in the name of an image.
func (r Reference) digest() (id digest.Digest, ok bool) {
	named, err := dockerref.ParseNormalizedNamed(r.name)
	if err != nil {
		return "", false
	}
	canonical, ok := named.(dockerref.Canonical)
	if !ok {
		return "", false
	}
	return canonical.Digest(), true
}

// AreResolved reports whether others are the references, in the same order, with digests as [Reference.WithDigest] adds them.
func AreResolved(refs, others []Reference) bool {
	return slices.EqualFunc(refs, others, Reference.isResolved)
}

// String returns the canonical form of the reference, which Parse parses to the same value.
func (r Reference) String() string {
	switch {
	case r.scheme == "":
		return ""
	case r.scheme == OCI && (r.path != "" || r.platform != ""):
		parameters := url.Values{}
		if r.path != "" {
			parameters.Set("path", "/"+r.path)
		}
		if r.platform != "" {
			parameters.Set("platform", r.platform)
		}
		return "oci://" + r.name + "?" + parameters.Encode()
	case r.path == "":
		return string(r.scheme) + "://" + r.name
	}
	return string(r.scheme) + "://" + r.name + "/" + escapePath(r.path)
}

// escapePath escapes the separators of a list of references, white space, which ParseList trims, the characters that
// begin an escape, a query or a fragment, and all that is not printable.
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

// MarshalText implements encoding.TextMarshaler.
func (r Reference) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Reference) UnmarshalText(text []byte) error {
	parsed, err := Parse(string(text))
	if err != nil {
		return err
	}
	*r = parsed
	return nil
}
