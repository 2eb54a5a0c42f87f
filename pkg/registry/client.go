package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/semaphore"
)

// Config configures access to registries.
type Config struct {
	// CertsDir is a directory with a file <host>/hosts.toml for each configured registry (containerd, docs/hosts.md). The
	// file is read again for each request. Registries without a file are reached by HTTPS, or by HTTP on localhost.
	CertsDir string
	// CredentialsFile is the path of a Docker config.json with the node's credentials, or "". A volume's own credentials
	// take precedence. The file is read again for each request.
	CredentialsFile string
	// CredentialsNamespaces are the namespaces whose volumes may use the node's credentials. AllNamespaces stands for all of them.
	CredentialsNamespaces []string
	// SpoolDir is the directory whose file system has large manifests while they are read. It is that of temporary files by default.
	SpoolDir string
	// SpoolReserve is the percentage of the disk of SpoolDir that large manifests leave free. They are in memory instead.
	SpoolReserve int
	// UserAgent is the User-Agent header of all requests.
	UserAgent string
	// StallTimeout is the time after which a request that receives less than 1 KiB/s is retried.
	StallTimeout time.Duration
	// Backoff is the pause after the first failed request of a download. It doubles after each further failure. It is also the pause before
	// a request that continues a body that was cut off, or that a registry was too busy to answer.
	Backoff time.Duration
}

// maxSending is how many blobs are sent at a time, by all pushes together.
const maxSending = 3

// AllNamespaces is the entry of Config.CredentialsNamespaces for every namespace.
const AllNamespaces = "*"

// Client accesses registries.
type Client struct {
	config Config
	header http.Header
	// spare bounds the memory for large documents that the disk has no room for.
	spare *semaphore.Weighted
	// sending bounds the blobs that are sent.
	sending *semaphore.Weighted
}

// NewClient returns a client. It sends no request.
func NewClient(config Config) *Client {
	return &Client{
		config: config, header: http.Header{"User-Agent": {config.UserAgent}}, spare: semaphore.NewWeighted(spareMemory),
		sending: semaphore.NewWeighted(maxSending),
	}
}

// mayUseNode reports whether the node's credentials may be used beside those of a volume.
func (c *Client) mayUseNode(credentials Credentials) bool {
	return credentials.operator || slices.ContainsFunc(c.config.CredentialsNamespaces, func(namespace string) bool {
		return namespace == AllNamespaces || namespace == credentials.namespace && namespace != ""
	})
}

// nodeCredentials reads the node's credentials for use beside those of a volume. The file may change while the driver runs, for example to
// renew a token.
func (c *Client) nodeCredentials(volume Credentials) (Credentials, error) {
	if c.config.CredentialsFile == "" || !c.mayUseNode(volume) {
		return Credentials{}, nil
	}
	credentials, err := ReadCredentials(c.config.CredentialsFile)
	if err != nil {
		return Credentials{}, fmt.Errorf("%w: read the node's registry credentials: %w", errdefs.ErrFailedPrecondition, err)
	}
	return credentials, nil
}

// hosts returns the hosts that serve a registry, mirrors first. Each receives only the login for it.
func (c *Client) hosts(host string, credentials func(host string) (string, string, error)) ([]docker.RegistryHost, error) {
	hook := &firstLoggedError{}
	ctx := log.WithLogger(context.Background(), discardLogger(hook))
	options := dockerconfig.HostOptions{
		UpdateClient: func(client *http.Client) error {
			if _, isOurs := client.Transport.(roundTripper); isOurs {
				// A hosts.toml with headers alone has the client of the host updated twice.
				return nil
			}
			client.Transport = pauseBeforeRepeats(c.config.Backoff, countRepeated(acceptIdentity(answerHead(keepSecrets(client.Transport)))))
			return nil
		},
	}
	if c.config.CertsDir != "" {
		options.HostDir = dockerconfig.HostDirFromRoot(c.config.CertsDir)
	}
	hosts, err := dockerconfig.ConfigureHosts(ctx, options)(host)
	// containerd only logs that it cannot read hosts.toml. It would then use the registry instead of the mirror.
	if err == nil && hook.message != "" {
		err = errors.New(hook.message)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: read the configuration of registry %s in %s: %w",
			errdefs.ErrFailedPrecondition, host, c.config.CertsDir, err)
	}
	for i := range hosts {
		bindHost(&hosts[i], credentials)
	}
	return hosts, nil
}
