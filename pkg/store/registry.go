package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

// Registries are where images come from, and how they are reached.
type Registries struct {
	certsDir string
	// nodeConfig is the file with the node's credentials, "" where it has none.
	nodeConfig string
	header     http.Header
}

// NewRegistries returns the registries as certsDir has them configured, in the form of containerd's
// certs.d/<host>/hosts.toml (containerd, docs/hosts.md), read anew for each request. Without it, or without a directory
// for a host, a registry is asked by HTTPS, or one on localhost by HTTP. nodeConfig is a Docker config.json, or "", with
// credentials for what a volume's own do not cover.
func NewRegistries(certsDir, nodeConfig, userAgent string) *Registries {
	return &Registries{certsDir: certsDir, nodeConfig: nodeConfig, header: http.Header{"User-Agent": {userAgent}}}
}

// nodeCredentials are the node's at the moment: tokens in the file are renewed while the driver goes on.
func (r *Registries) nodeCredentials() (Credentials, error) {
	if r.nodeConfig == "" {
		return Credentials{}, nil
	}
	credentials, err := ReadCredentials(r.nodeConfig)
	if err != nil {
		return Credentials{}, fmt.Errorf("%w: the node's credentials for registries: %w", errdefs.ErrFailedPrecondition, err)
	}
	return credentials, nil
}

// repository is one image's repository in a registry, as one set of credentials sees it.
type repository struct {
	named reference.Named
	// registry is the host in the reference; mirrors may answer for it.
	registry string
	resolver remotes.Resolver
	// shown is the user that a registry was last told, "" for nobody.
	shown *atomic.Pointer[string]
}

// open returns the repository of an image. It asks nobody yet.
func (r *Registries) open(named reference.Named, credentials Credentials) *repository {
	repo := &repository{named: named, registry: reference.Domain(named), shown: &atomic.Pointer[string]{}}
	repo.resolver = docker.NewResolver(docker.ResolverOptions{
		Headers: r.header,
		Hosts: func(host string) ([]docker.RegistryHost, error) {
			return r.hosts(host, func(host string) (string, string, error) {
				node, err := r.nodeCredentials()
				if err != nil {
					return "", "", err
				}
				for _, c := range []Credentials{credentials, node} {
					if found, ok := c.find(host, reference.Path(named)); ok {
						repo.shown.Store(&found.user)
						return found.user, found.secret, nil
					}
				}
				return "", "", nil
			})
		},
	})
	return repo
}

// hosts are where a registry is reached, mirrors first.
func (r *Registries) hosts(host string, credentials func(host string) (string, string, error)) ([]docker.RegistryHost, error) {
	trouble := &troubleHook{}
	ctx := log.WithLogger(context.Background(), quietLogger(trouble))
	guard := &plainGuard{}
	options := dockerconfig.HostOptions{
		Credentials: credentials,
		UpdateClient: func(client *http.Client) error {
			client.Transport = guard.around(client.Transport)
			return nil
		},
	}
	if r.certsDir != "" {
		options.HostDir = dockerconfig.HostDirFromRoot(r.certsDir)
	}
	hosts, err := dockerconfig.ConfigureHosts(ctx, options)(host)
	// containerd goes on without a file that it cannot read, and asks the registry instead of the mirror.
	if err == nil && trouble.first != "" {
		err = errors.New(trouble.first)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: the configuration of registry %s in %s: %w", errdefs.ErrFailedPrecondition, host, r.certsDir, err)
	}
	for _, h := range hosts {
		if h.Scheme == "http" {
			guard.plain = append(guard.plain, hostname(h.Host))
		}
	}
	return hosts, nil
}

// plainGuard keeps credentials off plain HTTP, but for hosts that are configured so: a registry names the server that
// gives out tokens, and redirects, as it likes.
type plainGuard struct {
	plain []string
}

func (g *plainGuard) around(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(request *http.Request) (*http.Response, error) {
		secret := request.Header.Get("Authorization") != "" || request.Method == http.MethodPost
		if secret && request.URL.Scheme == "http" && !slices.Contains(g.plain, request.URL.Hostname()) {
			return nil, fmt.Errorf("%w: credentials are not sent to http://%s, where everybody on the way can read them", errdefs.ErrFailedPrecondition, request.URL.Host)
		}
		return next.RoundTrip(request)
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(request *http.Request) (*http.Response, error) { return f(request) }

func hostname(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return host
}

// quietLogger keeps what containerd logs to itself: the errors that it returns say it too.
func quietLogger(hooks ...logrus.Hook) *log.Entry {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.SetLevel(logrus.ErrorLevel)
	for _, hook := range hooks {
		logger.AddHook(hook)
	}
	return logrus.NewEntry(logger)
}

// troubleHook remembers the first error that was logged instead of returned.
type troubleHook struct{ first string }

func (*troubleHook) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

func (h *troubleHook) Fire(entry *logrus.Entry) error {
	if h.first == "" {
		h.first = fmt.Sprintf("%s: %v", entry.Message, entry.Data[logrus.ErrorKey])
	}
	return nil
}

// resolve asks what the tag, or the digest, stands for.
func (r *repository) resolve(ctx context.Context) (ocispec.Descriptor, error) {
	ctx = log.WithLogger(ctx, quietLogger())
	_, descriptor, err := r.resolver.Resolve(ctx, r.named.String())
	if err != nil {
		return descriptor, r.explain("resolve", err)
	}
	if err := descriptor.Digest.Validate(); err != nil {
		return descriptor, r.explain("resolve", fmt.Errorf("%w: its digest: %w", errLied, err))
	}
	if pinned, ok := r.named.(reference.Digested); ok && pinned.Digest() != descriptor.Digest {
		return descriptor, r.explain("resolve", fmt.Errorf("%w: it answers with %s", errLied, descriptor.Digest))
	}
	return descriptor, nil
}

// maxDocument is the largest manifest, index or configuration in bytes.
const maxDocument = 8 << 20

// document fetches a manifest or a configuration, whole and verified.
func (r *repository) document(ctx context.Context, descriptor ocispec.Descriptor) ([]byte, error) {
	if descriptor.Size > maxDocument {
		return nil, r.explain("fetch "+descriptor.Digest.String(), fmt.Errorf("%w: it has %d bytes: at most %d", errLied, descriptor.Size, maxDocument))
	}
	body, err := r.blob(ctx, descriptor, 0)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	data, err := io.ReadAll(io.LimitReader(body, maxDocument+1))
	switch {
	case errdefs.IsFailedPrecondition(err):
		err = tooLong(descriptor)
	case err == nil:
		err = verify(descriptor, descriptor.Digest.Algorithm().FromBytes(data), int64(len(data)))
	}
	if err != nil {
		return nil, r.explain("fetch "+descriptor.Digest.String(), err)
	}
	return data, nil
}

// errLied says that a registry gave something else than what it, or the reference, had said.
var errLied = fmt.Errorf("%w: the registry's answer is wrong", errdefs.ErrFailedPrecondition)

// verify compares what came with what was asked for.
func verify(want ocispec.Descriptor, got digest.Digest, size int64) error {
	switch {
	case want.Size != size:
		return fmt.Errorf("%w: %s has %d bytes instead of %d", errLied, want.Digest, size, want.Size)
	case want.Digest != got:
		return fmt.Errorf("%w: the content of %s has digest %s", errLied, want.Digest, got)
	}
	return nil
}

// blob opens a blob from offset on. The error may be one of reading, later.
func (r *repository) blob(ctx context.Context, descriptor ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	ctx = log.WithLogger(ctx, quietLogger())
	// Where else the image says that the blob lies is the image's to say, not the operator's.
	descriptor.URLs = nil
	fetcher, err := r.resolver.Fetcher(ctx, r.named.String())
	if err != nil {
		return nil, r.explain("fetch "+descriptor.Digest.String(), err)
	}
	body, err := fetcher.Fetch(ctx, descriptor)
	if err != nil {
		return nil, r.explain("fetch "+descriptor.Digest.String(), err)
	}
	if offset > 0 {
		if _, err := body.(io.Seeker).Seek(offset, io.SeekStart); err != nil {
			return nil, errors.Join(err, body.Close())
		}
	}
	return body, nil
}

// explain names the registry and the image in an error, says what kind it is of, and where it was about access, whose
// credentials were shown.
func (r *repository) explain(action string, err error) error {
	who := "without credentials: none of the volume's secret or the node's are for it"
	if user := r.shown.Load(); user != nil {
		who = fmt.Sprintf("as user %q", *user)
		if *user == "" {
			who = "with a token"
		}
	}
	var status remoteerrors.ErrUnexpectedStatus
	isStatus := errors.As(err, &status)
	kind := error(errdefs.ErrUnavailable)
	switch {
	case errors.Is(err, docker.ErrInvalidAuthorization), isStatus && status.StatusCode == http.StatusUnauthorized:
		kind, action = errdefs.ErrUnauthenticated, action+" "+who
	case isStatus && status.StatusCode == http.StatusForbidden:
		kind, action = errdefs.ErrPermissionDenied, action+" "+who
	case errors.Is(err, errLied), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("registry %s: image %s: %s: %w", r.registry, r.named, action, err)
	case errdefs.IsNotFound(err):
		kind = errdefs.ErrNotFound
	case errdefs.IsFailedPrecondition(err), errdefs.IsInvalidArgument(err):
		kind = errdefs.ErrFailedPrecondition
	}
	return fmt.Errorf("%w: registry %s: image %s: %s: %s", kind, r.registry, r.named, action, err.Error())
}
