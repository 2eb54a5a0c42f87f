package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// errBlobLost is wrapped by the error of a manifest that lists a blob which the registry has no more.
var errBlobLost = fmt.Errorf("%w: the registry has lost a blob of the image", errdefs.ErrUnavailable)

func pushOp(descriptor ocispec.Descriptor) string { return "push " + descriptor.Digest.String() }

// wrapPush returns the error of a push as an *Error of this repository, and says what to do. Errors of the repository that the content is
// copied from are returned unchanged, like all of type *Error.
func (r *Repository) wrapPush(descriptor ocispec.Descriptor, err error) error {
	var known *Error
	if errors.As(err, &known) {
		return err
	}
	wrapped := &Error{Registry: r.registry, Image: r.named.String(), Op: pushOp(descriptor)}
	if general := r.wrap(wrapped.Op, err); errors.As(general, &wrapped) {
		wrapped.Message = cleanMessage(err.Error())
	}
	repository := reference.Path(r.named)
	if wrapped.User != "" {
		wrapped.Message += fmt.Sprintf("; check that the secret has a login for %s that may push to repository %s", r.registry, repository)
		return wrapped
	}
	var status remoteerrors.ErrUnexpectedStatus
	if !errors.As(err, &status) {
		return wrapped
	}
	switch code := status.StatusCode; {
	case hasCode(status, "MANIFEST_BLOB_UNKNOWN", "BLOB_UNKNOWN") && status.RequestMethod == http.MethodPut:
		wrapped.Kind = errBlobLost
	case code == http.StatusNotFound && status.RequestMethod == http.MethodPost:
		wrapped.Kind = errdefs.ErrNotFound
		wrapped.Message += fmt.Sprintf("; create repository %s in the registry", repository)
	case code == http.StatusMethodNotAllowed, code == http.StatusNotImplemented:
		wrapped.Kind = errdefs.ErrFailedPrecondition
		wrapped.Message += "; the registry takes no pushes, as one that is read-only or a mirror: push to another one"
	case code == http.StatusRequestEntityTooLarge:
		wrapped.Kind = errdefs.ErrFailedPrecondition
		wrapped.Message += fmt.Sprintf("; the registry, or a proxy before it, takes no content of %d bytes: raise its limit", descriptor.Size)
	case code >= 400 && code < 500 && !slices.Contains(transient, code):
		wrapped.Kind = errdefs.ErrFailedPrecondition
	}
	return wrapped
}

// transient are the statuses of refused requests that may succeed when they are repeated. An upload that a registry has forgotten is not
// found.
var transient = []int{http.StatusNotFound, http.StatusRequestTimeout, http.StatusConflict, http.StatusRequestedRangeNotSatisfiable,
	http.StatusTooEarly, http.StatusTooManyRequests}

// hasCode reports whether an answer has an error with one of these codes (OCI distribution specification, "Error Codes").
func hasCode(status remoteerrors.ErrUnexpectedStatus, codes ...string) bool {
	var answer struct {
		Errors []struct {
			Code string `json:"code"`
		} `json:"errors"`
	}
	if json.Unmarshal(status.Body, &answer) != nil {
		return false
	}
	for _, e := range answer.Errors {
		if slices.Contains(codes, e.Code) {
			return true
		}
	}
	return false
}
