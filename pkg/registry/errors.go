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

// Error is a failure of a registry, or a wrong answer from it.
type Error struct {
	// Registry is the host in the image's name; a mirror may have answered for it.
	Registry string
	// Image is the image's name.
	Image string
	// Op is what failed: "resolve", or "fetch" with a digest.
	Op string
	// User says whose credentials were sent. It is empty unless access was denied.
	User string
	// Kind is the error that errors.Is finds: an error of errdefs, image.ErrContentMismatch, or that of a context.
	Kind error
	// Message is what the registry said, bounded.
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

// wrap returns err as an *Error of this repository. An *Error stays as it is.
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

// WrapMismatch returns an error about downloaded content as one of the registry that sent it.
func (r *Repository) WrapMismatch(err error) error { return r.wrap("unpack", err) }

// describeUser says whose credentials the registry last got.
func (r *Repository) describeUser() string {
	user := r.lastUser.Load()
	switch {
	case user == nil:
		return "without credentials: neither the volume's secret nor the node's credentials have an entry for it"
	case *user == "":
		return "with a token"
	}
	return fmt.Sprintf("as user %q", *user)
}

// maxMessage is the longest message of a registry in bytes.
const maxMessage = 1 << 10

// query is the query of a URL, which may have the signature of a presigned one.
var query = regexp.MustCompile(`(https?://[^\s"?]*)\?[^\s"]*`)

// cleanMessage makes a text that a registry may have chosen fit for errors, events and the log.
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
