package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// Config says how registries are reached.
type Config struct {
	// CertsDir has <host>/hosts.toml for registries, in containerd's form (containerd, docs/hosts.md), read again for each
	// request. Without it, or without a directory for a host, a registry is reached by HTTPS, or by HTTP on localhost.
	CertsDir string
	// CredentialsFile is a Docker config.json with the node's credentials, which come after a volume's own. It is read
	// again for each request. "" is none.
	CredentialsFile string
	UserAgent       string
	// StallTimeout is how long a registry may send next to nothing before the request is tried again.
	StallTimeout time.Duration
	// Backoff is the pause after the first failed request of a download. It doubles with each further one.
	Backoff time.Duration
}

// Client reaches registries.
type Client struct {
	config Config
	header http.Header
}

// NewClient returns a client. It asks nobody yet.
func NewClient(config Config) *Client {
	return &Client{config: config, header: http.Header{"User-Agent": {config.UserAgent}}}
}

// nodeCredentials returns the node's current credentials: tokens in the file are renewed while the driver runs.
func (c *Client) nodeCredentials() (Credentials, error) {
	if c.config.CredentialsFile == "" {
		return Credentials{}, nil
	}
	credentials, err := ReadCredentials(c.config.CredentialsFile)
	if err != nil {
		return Credentials{}, fmt.Errorf("%w: read the node's credentials for registries: %w", errdefs.ErrFailedPrecondition, err)
	}
	return credentials, nil
}

// hosts returns where a registry is reached, mirrors first.
func (c *Client) hosts(host string, credentials func(host string) (string, string, error)) ([]docker.RegistryHost, error) {
	hook := &firstLoggedError{}
	ctx := log.WithLogger(context.Background(), discardLogger(hook))
	guard := &httpsOnlyCredentials{}
	options := dockerconfig.HostOptions{
		Credentials: credentials,
		UpdateClient: func(client *http.Client) error {
			client.Transport = boundTokens(guard.wrap(client.Transport))
			return nil
		},
	}
	if c.config.CertsDir != "" {
		options.HostDir = dockerconfig.HostDirFromRoot(c.config.CertsDir)
	}
	hosts, err := dockerconfig.ConfigureHosts(ctx, options)(host)
	// containerd goes on without a file that it cannot read, and asks the registry instead of the mirror.
	if err == nil && hook.message != "" {
		err = errors.New(hook.message)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: read the configuration of registry %s in %s: %w", errdefs.ErrFailedPrecondition, host, c.config.CertsDir, err)
	}
	for i, h := range hosts {
		if h.Scheme == "http" {
			guard.exceptions = append(guard.exceptions, hostname(h.Host))
		}
		hosts[i].Authorizer = tokenAuthorizer{h.Authorizer}
	}
	return hosts, nil
}
