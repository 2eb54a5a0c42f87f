package registry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
)

// origin is a server that secrets are meant for: scheme, host and port.
type origin struct{ scheme, host, port string }

func originOf(u *url.URL) origin {
	o := origin{u.Scheme, u.Hostname(), u.Port()}
	if o.port == "" {
		o.port = map[string]string{"http": "80", "https": "443"}[o.scheme]
	}
	return o
}

// boundHost keeps the secrets of one host of a registry with that host. Secrets are its logins and tokens, and the headers that hosts.toml
// configures for it. The host chooses where it redirects requests to, and names its token server.
//
// The token server gets the login: that is the protocol (distribution, "Token Authentication Specification"). It may be another host, and
// gets no headers then.
type boundHost struct {
	origin
	header http.Header
	// isToken is true for requests to the token server.
	isToken bool
}

// boundHostKey is the context key of the boundHost that a request is meant for.
type boundHostKey struct{}

// bindHost replaces the client and the authorizer of a host by ones that keep its secrets with it. The transport of host.Client must have
// been wrapped by keepSecrets.
func bindHost(host *docker.RegistryHost, login func(host string) (string, string, error)) {
	bound := boundHost{origin: originOf(&url.URL{Scheme: host.Scheme, Host: host.Host}), header: host.Header}
	tokens := bound
	tokens.isToken = true
	transport := host.Client.Transport
	_, isOurs := transport.(roundTripper)
	// containerd sets CheckRedirect of clients that have none.
	host.Client = &http.Client{Transport: bound.wrap(transport)}
	tokenClient := docker.WithAuthClient(&http.Client{Transport: tokens.wrap(transport), CheckRedirect: checkTokenRedirect})
	host.Authorizer = &boundAuthorizer{
		origin:   bound.origin,
		fallback: !isOurs,
		own: docker.NewDockerAuthorizer(tokenClient, docker.WithAuthHeader(host.Header),
			docker.WithAuthCreds(func(string) (string, string, error) { return login(host.Host) })),
		others: docker.NewDockerAuthorizer(tokenClient),
	}
}

// wrap marks requests as meant for the host.
func (b boundHost) wrap(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(request *http.Request) (*http.Response, error) {
		return next.RoundTrip(request.WithContext(context.WithValue(request.Context(), boundHostKey{}, b)))
	})
}

// keepSecrets removes configured headers from requests to other origins than the one that they are meant for. It returns an error for a
// login, a token or content that another origin would receive without encryption. It is below containerd's fallback from HTTPS to HTTP.
func keepSecrets(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(request *http.Request) (*http.Response, error) {
		bound, ok := request.Context().Value(boundHostKey{}).(boundHost)
		if !ok {
			return nil, errors.New("the request is meant for no host")
		}
		if to := originOf(request.URL); to != bound.origin {
			if err := bound.checkEncryption(request, to); err != nil {
				closeBody(request)
				return nil, err
			}
			request = request.Clone(request.Context())
			for key := range bound.header {
				// Keys of hosts.toml may not be canonical.
				delete(request.Header, key)
				request.Header.Del(key)
			}
		}
		response, err := next.RoundTrip(request)
		if err == nil && bound.isToken {
			response.Body = &boundedBody{response.Body, maxTokenAnswer}
		}
		return response, err
	})
}

// checkEncryption returns an error if a request would have another origin receive a login, a token or content without encryption, although
// the host has it. A host that is configured with HTTP has none to keep.
func (b boundHost) checkEncryption(request *http.Request, to origin) error {
	switch {
	case to.scheme == "https", b.scheme == "http" && to.host == b.host:
		return nil
	case request.Header.Get("Authorization") != "", b.isToken && hasBody(request):
		return fmt.Errorf("%w: credentials are not sent to http://%s without encryption; use https",
			errdefs.ErrInvalidArgument, request.URL.Host)
	case hasBody(request) && b.scheme == "https" && (to.host != b.host || !isLoopback(to.host)):
		return fmt.Errorf("%w: content is not sent to http://%s without encryption, where %s wants it; "+
			"behind a proxy, a registry must be configured with its https address", errdefs.ErrInvalidArgument, request.URL.Host, b.host)
	}
	return nil
}

// isLoopback reports whether a host is this one. containerd tries HTTPS first there, and HTTP then.
func isLoopback(host string) bool {
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}

// closeBody closes the body of a request that is not sent. containerd's pusher writes the body, and waits for somebody to read it.
func closeBody(request *http.Request) {
	if request.Body != nil {
		request.Body.Close()
	}
}

func hasBody(request *http.Request) bool { return request.Body != nil && request.Body != http.NoBody }

// hasLogin reports whether a request for a token has a login or token.
func hasLogin(request *http.Request) bool {
	return request.Header.Get("Authorization") != "" || hasBody(request)
}

// checkTokenRedirect returns an error if a login would follow a redirect of a token server to another origin.
func checkTokenRedirect(request *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return errors.New("stopped after 10 redirects")
	}
	if hasLogin(request) && originOf(request.URL) != originOf(via[0].URL) {
		return fmt.Errorf("%w: the token server %s redirects credentials to %s", errdefs.ErrInvalidArgument, via[0].URL.Host, request.URL.Host)
	}
	return nil
}

// boundAuthorizer sends the host's login and tokens to the host. Other origins, which the host redirects to, get anonymous tokens: whoever
// runs a registry must not use the node's credentials for another one.
type boundAuthorizer struct {
	origin
	// fallback is set if containerd tries HTTPS first and HTTP then. It does so for localhost, and for a host that is configured with HTTP
	// and a CA.
	fallback    bool
	own, others docker.Authorizer
}

// Authorize implements docker.Authorizer. It is also called for redirects, whose requests have the headers of the first one: net/http
// removes a login only if the name of the host changes.
func (a *boundAuthorizer) Authorize(ctx context.Context, request *http.Request) error {
	of := a.of(request)
	if of == a.others {
		request.Header.Del("Authorization")
	}
	err := of.Authorize(ctx, request)
	if err != nil {
		closeBody(request)
	}
	return err
}

// AddResponses implements docker.Authorizer.
func (a *boundAuthorizer) AddResponses(ctx context.Context, responses []*http.Response) error {
	return a.of(responses[len(responses)-1].Request).AddResponses(ctx, responses)
}

func (a *boundAuthorizer) of(request *http.Request) docker.Authorizer {
	of := originOf(request.URL)
	if of == a.origin || a.fallback && of.host == a.host && of.port == a.port {
		return a.own
	}
	return a.others
}
