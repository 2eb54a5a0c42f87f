package registry

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(request *http.Request) (*http.Response, error) { return f(request) }

// httpsOnlyCredentials refuses to send credentials over plain HTTP, except to hosts that are configured with plain HTTP. It
// is needed because a registry chooses its token server and its redirects.
type httpsOnlyCredentials struct{ exceptions []string }

func (g *httpsOnlyCredentials) wrap(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(request *http.Request) (*http.Response, error) {
		secret := request.Header.Get("Authorization") != "" || request.Method == http.MethodPost
		if secret && request.URL.Scheme == "http" && !slices.Contains(g.exceptions, request.URL.Hostname()) {
			return nil, fmt.Errorf("%w: credentials are not sent to http://%s without encryption; use https",
				errdefs.ErrFailedPrecondition, request.URL.Host)
		}
		return next.RoundTrip(request)
	})
}

func hostname(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return host
}

// maxTokenAnswer is the maximum size of the answer of a token server in bytes.
const maxTokenAnswer = 1 << 20

// tokenRequest is the context key that marks requests to token servers.
type tokenRequest struct{}

// tokenAuthorizer marks requests for tokens. Their answers must be bounded, because containerd reads them into memory.
type tokenAuthorizer struct{ docker.Authorizer }

func (a tokenAuthorizer) Authorize(ctx context.Context, request *http.Request) error {
	return a.Authorizer.Authorize(context.WithValue(ctx, tokenRequest{}, true), request)
}

// boundTokens bounds the answers to requests that tokenAuthorizer marked.
func boundTokens(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(request *http.Request) (*http.Response, error) {
		response, err := next.RoundTrip(request)
		if err == nil && request.Context().Value(tokenRequest{}) != nil {
			response.Body = &boundedBody{response.Body, maxTokenAnswer}
		}
		return response, err
	})
}

// boundedBody returns an error after left bytes.
type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(buffer []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("%w: the token server's answer has more than %d bytes", errdefs.ErrFailedPrecondition, maxTokenAnswer)
	}
	n, err := b.ReadCloser.Read(buffer[:min(int64(len(buffer)), b.left)])
	b.left -= int64(n)
	return n, err
}

// discardLogger returns a logger that only calls hooks. The errors that containerd returns repeat its log messages.
func discardLogger(hooks ...logrus.Hook) *log.Entry {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.SetLevel(logrus.ErrorLevel)
	for _, hook := range hooks {
		logger.AddHook(hook)
	}
	return logrus.NewEntry(logger)
}

// firstLoggedError is a hook that stores the first error that is logged.
type firstLoggedError struct{ message string }

// Levels implements logrus.Hook.
func (*firstLoggedError) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

// Fire implements logrus.Hook.
func (h *firstLoggedError) Fire(entry *logrus.Entry) error {
	if h.message == "" {
		h.message = fmt.Sprintf("%s: %v", entry.Message, entry.Data[logrus.ErrorKey])
	}
	return nil
}
