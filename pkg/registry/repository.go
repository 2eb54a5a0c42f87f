package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// Repository is the repository of one image, accessed with one set of credentials.
type Repository struct {
	named    reference.Named
	registry string
	resolver remotes.Resolver
	// options are those of resolver.
	options docker.ResolverOptions
	// client has what all repositories share.
	client *Client
	config Config
	// credentialsID identifies the credentials, those of the node included.
	credentialsID string
	// refusal says why the node's credentials are not used. It is empty if they are.
	refusal string
	// logins are the IDs of the logins that may be sent.
	logins []string
	// lastLogin is the last login that was sent, nil if none was.
	lastLogin *atomic.Pointer[sentLogin]
}

// sentLogin is a login that was sent to a registry.
type sentLogin struct {
	id string
	// user is "" for a token.
	user string
}

// Repository returns the repository of an image. It sends no request.
func (c *Client) Repository(named reference.Named, credentials Credentials) *Repository {
	repository := &Repository{
		named: named, registry: reference.Domain(named), client: c, config: c.config, credentialsID: credentials.ID(),
		lastLogin: &atomic.Pointer[sentLogin]{},
	}
	if credentials.ID() != "" {
		repository.logins = append(repository.logins, secretLogin+credentials.ID())
	}
	switch {
	case c.mayUseNode(credentials):
		repository.credentialsID += "+node"
		repository.logins = append(repository.logins, nodeLogin)
	case c.config.CredentialsFile != "":
		repository.refusal = fmt.Sprintf("namespace %q may not use the node's", credentials.namespace)
	}
	login := func(host string) (string, string, error) {
		node, err := c.nodeCredentials(credentials)
		if err != nil {
			return "", "", err
		}
		ids := []string{secretLogin + credentials.ID(), nodeLogin}
		for i, candidate := range []Credentials{credentials, node} {
			if found, ok := candidate.find(host, reference.Path(named)); ok {
				repository.lastLogin.Store(&sentLogin{ids[i], found.user})
				return found.user, found.secret, nil
			}
		}
		return "", "", nil
	}
	repository.options = docker.ResolverOptions{
		Headers: c.header,
		Hosts:   func(host string) ([]docker.RegistryHost, error) { return c.hosts(host, login) },
	}
	repository.resolver = docker.NewResolver(repository.options)
	return repository
}

// Named returns the name of the image.
func (r *Repository) Named() reference.Named { return r.named }

// IDs of logins. That of a secret has its hash.
const (
	nodeLogin   = "node"
	secretLogin = "secret:"
)

// Logins returns the IDs of the logins that requests to the repository may have. They do not disclose the logins.
func (r *Repository) Logins() []string { return r.logins }

// SentLogin returns the ID of the last login that was sent. It returns false if the registry has asked for none.
func (r *Repository) SentLogin() (string, bool) {
	login := r.lastLogin.Load()
	if login == nil {
		return "", false
	}
	return login.id, true
}

// CredentialsID returns the ID of the credentials that the repository is accessed with.
func (r *Repository) CredentialsID() string { return r.credentialsID }

// Resolve requests the descriptor of the image from the registry.
func (r *Repository) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, r.config.StallTimeout, errStalled)
	defer cancel()
	var size int64
	_, descriptor, err := r.resolver.Resolve(log.WithLogger(withManifestSize(ctx, &size), discardLogger()), r.named.String())
	if err != nil {
		return descriptor, r.wrap("resolve", stallCause(ctx, err))
	}
	descriptor.Size = max(descriptor.Size, size)
	if err := descriptor.Digest.Validate(); err != nil {
		return descriptor, r.wrap("resolve", fmt.Errorf("%w: the registry answered with an invalid digest: %w", image.ErrContentMismatch, err))
	}
	if digested, ok := r.named.(reference.Digested); ok && digested.Digest() != descriptor.Digest {
		return descriptor, r.wrap("resolve", fmt.Errorf("%w: the registry answered with digest %s", image.ErrContentMismatch, descriptor.Digest))
	}
	return descriptor, nil
}

// Fetch returns the content of a manifest, an index or a configuration. It verifies the digest. The content of a large one is in a file
// without a name, so that it takes no memory while the registry sends it, if the disk has room.
func (r *Repository) Fetch(ctx context.Context, descriptor ocispec.Descriptor) (io.ReadCloser, error) {
	if descriptor.Size < 0 || descriptor.Size > image.MaxDocumentSize {
		return nil, r.wrap(fetchOp(descriptor), fmt.Errorf("%w: the document has %d bytes; the maximum is %d",
			image.ErrContentMismatch, descriptor.Size, image.MaxDocumentSize))
	}
	document, err := r.newDocument(ctx, descriptor.Size)
	if err != nil {
		return nil, err
	}
	if err := r.fetchInto(ctx, document, descriptor); err != nil {
		document.Close()
		return nil, err
	}
	return document, nil
}

// fetchInto fetches a document and verifies its digest. An error in writing it is not the registry's, and is returned as it is.
func (r *Repository) fetchInto(ctx context.Context, to document, descriptor ocispec.Descriptor) error {
	op := fetchOp(descriptor)
	// A document may have 8 MiB, so that it takes longer than a tag.
	ctx, cancel := context.WithTimeoutCause(ctx, documentTimeouts*r.config.StallTimeout, errStalled)
	defer cancel()
	body, err := r.openBlob(ctx, descriptor, 0)
	if err != nil {
		return r.wrap(op, stallCause(ctx, err))
	}
	defer body.Close()
	writer := &documentWriter{to: to}
	digester := descriptor.Digest.Algorithm().Digester()
	// One byte more proves that it is too long.
	size, err := io.Copy(io.MultiWriter(writer, digester.Hash()), io.LimitReader(body, descriptor.Size+1))
	switch {
	case writer.err != nil:
		return writer.err
	case isTooLong(err), size > descriptor.Size:
		err = errTooLong(descriptor)
	case err == nil:
		err = image.Verify(descriptor, digester.Digest(), size)
	}
	if err != nil {
		return r.wrap(op, stallCause(ctx, err))
	}
	return to.rewind()
}

// documentTimeouts is the maximum time for a document, in stall timeouts.
const documentTimeouts = 4

func fetchOp(descriptor ocispec.Descriptor) string { return "fetch " + descriptor.Digest.String() }

func errTooLong(descriptor ocispec.Descriptor) error {
	return fmt.Errorf("%w: blob %s has more than %d bytes", image.ErrContentMismatch, descriptor.Digest, descriptor.Size)
}

// isTooLong reports whether reading a blob returned an error because it has more bytes than its descriptor says. containerd has no error of
// its own for that.
func isTooLong(err error) bool {
	return errdefs.IsFailedPrecondition(err) && !errors.Is(err, errTokenAnswer)
}

// openBlob opens a blob at offset. The request may be sent, and fail, only at the first read.
func (r *Repository) openBlob(ctx context.Context, descriptor ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	ctx = log.WithLogger(ctx, discardLogger())
	// An image must not choose the hosts that the node connects to.
	descriptor.URLs = nil
	fetcher, err := r.resolver.Fetcher(ctx, r.named.String())
	if err != nil {
		return nil, err
	}
	body, err := fetcher.Fetch(ctx, descriptor)
	if err != nil || offset == 0 {
		return body, err
	}
	seeker, ok := body.(io.Seeker)
	if !ok {
		return nil, errors.Join(fmt.Errorf("%w: %T has no Seek", errdefs.ErrNotImplemented, body), body.Close())
	}
	if _, err := seeker.Seek(offset, io.SeekStart); err != nil {
		return nil, errors.Join(err, body.Close())
	}
	return body, nil
}
