package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// digestHeader is the header with the digest of a manifest (OCI distribution specification, "Pulling manifests").
const digestHeader = "Docker-Content-Digest"

// manifestSize is the context key of a *int64 that answerHead sets to the size of the manifest in bytes.
type manifestSize struct{}

// answerHead answers HEAD requests for manifests, which containerd resolves names by. Where a registry refuses them, or leaves out the
// digest or the size, it sends GET instead. It hides sizes above docker.MaxManifestSize, which containerd refuses: Fetch takes larger
// manifests.
func answerHead(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(request *http.Request) (*http.Response, error) {
		response, err := next.RoundTrip(request)
		if err != nil || request.Method != http.MethodHead || !strings.Contains(request.URL.Path, "/manifests/") {
			return response, err
		}
		if isHeadRefused(response) {
			if response, err = getInstead(next, request, response); err != nil {
				return nil, err
			}
		}
		if size, ok := request.Context().Value(manifestSize{}).(*int64); ok && response.StatusCode == http.StatusOK {
			*size = response.ContentLength
			response.ContentLength = min(response.ContentLength, docker.MaxManifestSize)
		}
		return response, nil
	})
}

// isHeadRefused reports whether GET may have what the answer to HEAD lacks. Some registries answer HEAD with 403, 404 or 405.
func isHeadRefused(response *http.Response) bool {
	switch response.StatusCode {
	case http.StatusOK:
		return response.ContentLength < 0 || response.Header.Get(digestHeader) == ""
	case http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed:
		return true
	}
	return false
}

// getInstead sends a HEAD request as GET, and returns the answer without its body. It returns refused, the answer to HEAD, if GET is
// refused too.
func getInstead(next http.RoundTripper, head *http.Request, refused *http.Response) (*http.Response, error) {
	get := head.Clone(head.Context())
	get.Method = http.MethodGet
	response, err := next.RoundTrip(get)
	if err != nil {
		refused.Body.Close()
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return refused, nil
	}
	refused.Body.Close()
	hash := digest.SHA256.Digester()
	size, err := io.Copy(hash.Hash(), io.LimitReader(response.Body, image.MaxDocumentSize+1))
	if err != nil {
		return nil, err
	}
	if size > image.MaxDocumentSize {
		return nil, fmt.Errorf("%w: the manifest has more than %d bytes", errdefs.ErrFailedPrecondition, image.MaxDocumentSize)
	}
	response.Header.Set(digestHeader, hash.Digest().String())
	response.ContentLength, response.Body = size, io.NopCloser(bytes.NewReader(nil))
	return response, nil
}

// withManifestSize returns a context in which answerHead sets size.
func withManifestSize(ctx context.Context, size *int64) context.Context {
	return context.WithValue(ctx, manifestSize{}, size)
}
