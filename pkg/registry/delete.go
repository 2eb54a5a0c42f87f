package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// maxChallenges is how often a registry may ask for another login before it counts as refused.
const maxChallenges = 3

// Delete deletes a manifest, and with it all tags that it has. It returns nil if the registry has none, and also if the registry deletes
// nothing at all (OCI distribution specification, "Deleting Manifests"). Its errors are of type *Error.
func (r *Repository) Delete(ctx context.Context, id digest.Digest) error {
	ctx, cancel := context.WithTimeoutCause(ctx, r.config.StallTimeout, errStalled)
	defer cancel()
	op := "delete " + id.String()
	err := r.delete(log.WithLogger(ctx, discardLogger()), id)
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) {
		switch code := status.StatusCode; {
		case code == http.StatusNotFound, code == http.StatusMethodNotAllowed, code == http.StatusNotImplemented, hasCode(status, "UNSUPPORTED"):
			return nil
		}
	}
	wrapped := &Error{}
	if err = r.wrap(op, stallCause(ctx, err)); errors.As(err, &wrapped) && wrapped.User != "" {
		wrapped.Message += fmt.Sprintf("; check that the secret has a login for %s that may delete from repository %s",
			r.registry, reference.Path(r.named))
	}
	return err
}

// delete sends the request to the hosts that take pushes. containerd has no such request.
func (r *Repository) delete(ctx context.Context, id digest.Digest) error {
	hosts, err := r.options.Hosts(r.registry)
	if err != nil {
		return err
	}
	for _, host := range hosts {
		if host.Capabilities.Has(docker.HostCapabilityPush) {
			return r.deleteFrom(ctx, host, id)
		}
	}
	return fmt.Errorf("%w: no host of the registry takes pushes", errdefs.ErrFailedPrecondition)
}

func (r *Repository) deleteFrom(ctx context.Context, host docker.RegistryHost, id digest.Digest) error {
	target := url.URL{Scheme: host.Scheme, Host: host.Host, Path: path.Join("/", host.Path, reference.Path(r.named), "manifests", id.String())}
	var responses []*http.Response
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodDelete, target.String(), http.NoBody)
		if err != nil {
			return err
		}
		for _, header := range []http.Header{r.options.Headers, host.Header} {
			for key, values := range header {
				request.Header[key] = values
			}
		}
		if err := host.Authorizer.Authorize(ctx, request); err != nil {
			return err
		}
		response, err := host.Client.Do(request)
		if err != nil {
			return err
		}
		if response.Request.Method != http.MethodDelete {
			// net/http asks with GET where some redirects point: the answer to that says nothing of the manifest.
			response.Body.Close()
			return fmt.Errorf("%w: %s redirects the request to %s", errdefs.ErrUnavailable, host.Host, response.Request.URL.Host)
		}
		if response.StatusCode >= 200 && response.StatusCode < 300 {
			return response.Body.Close()
		}
		refused := remoteerrors.NewUnexpectedStatusErr(response)
		response.Body.Close()
		responses = append(responses, response)
		if response.StatusCode != http.StatusUnauthorized || len(responses) > maxChallenges ||
			host.Authorizer.AddResponses(ctx, responses) != nil {
			return refused
		}
	}
}
