package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"unicode"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// Error is a failed request to a registry, or an invalid answer.
type Error struct {
	// Registry is the host in the name of the image. The answer may be from a mirror.
	Registry string
	// Image is the name of the image.
	Image string
	// Op is the operation that failed: "resolve", "unpack", or "fetch" with a digest.
	Op string
	// User describes the credentials of the request. It is empty unless access was denied.
	User string
	// Kind is the wrapped error: an error of errdefs, image.ErrContentMismatch, or an error of package context.
	Kind error
	// Message is the text of the failure. It may be from the registry, and is bounded.
	Message string
}

func (e *Error) Error() string {
	op := e.Op
	if e.User != "" {
		op += " " + e.User
	}
	text := fmt.Sprintf("registry %s: image %s: %s: %s", e.Registry, e.Image, op, e.Message)
	if strings.Contains(e.Message, e.Kind.Error()) {
		return text
	}
	return e.Kind.Error() + ": " + text
}

func (e *Error) Unwrap() error { return e.Kind }

// wrap returns err as an *Error of this repository. It returns an *Error unchanged.
func (r *Repository) wrap(op string, err error) error {
	var known *Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	wrapped := &Error{Registry: r.registry, Image: r.named.String(), Op: op, Kind: errdefs.ErrUnavailable, Message: cleanMessage(err.Error())}
	var status remoteerrors.ErrUnexpectedStatus
	isStatus := errors.As(err, &status)
	switch {
	case errors.Is(err, docker.ErrInvalidAuthorization), isStatus && status.StatusCode == http.StatusUnauthorized:
		wrapped.Kind, wrapped.User = errdefs.ErrUnauthenticated, r.describeUser()
	case isStatus && status.StatusCode == http.StatusForbidden:
		wrapped.Kind, wrapped.User = errdefs.ErrPermissionDenied, r.describeUser()
	case errors.Is(err, image.ErrContentMismatch):
		wrapped.Kind = image.ErrContentMismatch
	case errors.Is(err, context.Canceled):
		wrapped.Kind = context.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		wrapped.Kind = context.DeadlineExceeded
	case errdefs.IsNotFound(err):
		wrapped.Kind = errdefs.ErrNotFound
	case errdefs.IsFailedPrecondition(err), errdefs.IsInvalidArgument(err):
		wrapped.Kind = errdefs.ErrFailedPrecondition
	}
	return wrapped
}

// WrapMismatch returns an error about downloaded content as an *Error of the registry that sent it.
func (r *Repository) WrapMismatch(err error) error { return r.wrap("unpack", err) }

// describeUser describes the credentials that the last request was sent with.
func (r *Repository) describeUser() string {
	login := r.lastLogin.Load()
	switch {
	case login == nil && r.refusal != "":
		return "without credentials: the volume's secret has no entry for the image, and " + r.refusal
	case login == nil:
		return "without credentials: neither the volume's secret nor the node's credentials have an entry for the image"
	case login.user == "":
		return "with a token"
	}
	return fmt.Sprintf("as user %q", login.user)
}

// maxMessage is the maximum length of Error.Message in bytes.
const maxMessage = 1 << 10

// query matches a URL with a query. The query of a presigned URL contains its signature.
var query = regexp.MustCompile(`(https?://[^\s"?]*)\?[^\s"]*`)

// cleanMessage returns text without queries of URLs, without control characters, and with at most maxMessage bytes. The text
// may be from a registry.
func cleanMessage(text string) string {
	text = query.ReplaceAllStringFunc(text, func(url string) string {
		path, _, _ := strings.Cut(url, "?")
		if strings.HasSuffix(url, ":") {
			return path + "?…:"
		}
		return path + "?…"
	})
	if len(text) > maxMessage {
		text = strings.ToValidUTF8(text[:maxMessage], "") + "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
}
