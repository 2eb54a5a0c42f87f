package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/authn/kubernetes"
	corev1 "k8s.io/api/core/v1"
)

// Credentials are logins for registries. The zero value is anonymous access.
type Credentials struct {
	keychain authn.Keychain
	id       string
	// namespace is the namespace of the volume. It decides whether the node's credentials may be used too.
	namespace string
	// operator is set if the node's credentials may be used in any case.
	operator bool
}

// Operator returns the credentials for what the operator asks for: those of the node.
func Operator() Credentials { return Credentials{operator: true} }

// AsOperator returns the credentials for what the operator asks for with them: those of the node may be used beside them.
func (c Credentials) AsOperator() Credentials {
	c.operator = true
	return c
}

// InNamespace returns the credentials for a volume in a namespace.
func (c Credentials) InNamespace(namespace string) Credentials {
	c.namespace = namespace
	return c
}

// ID returns a hash that identifies the credentials without disclosing them.
func (c Credentials) ID() string { return c.id }

// ParseCredentials parses the data of a Secret of type kubernetes.io/dockerconfigjson or kubernetes.io/dockercfg. It returns
// anonymous credentials if data is empty. Entries match images as in a pod's imagePullSecrets: the longest match of registry
// and repository wins, and the name of the registry may contain `*`.
func ParseCredentials(data map[string]string) (Credentials, error) {
	if len(data) == 0 {
		return Credentials{}, nil
	}
	secret := corev1.Secret{Type: corev1.SecretTypeDockerConfigJson, Data: map[string][]byte{}}
	for key, value := range data {
		secret.Data[key] = []byte(value)
	}
	if _, ok := data[corev1.DockerConfigJsonKey]; !ok {
		if _, ok := data[corev1.DockerConfigKey]; !ok {
			keys := slices.Sorted(maps.Keys(data))
			return Credentials{}, fmt.Errorf("%w: the secret has the keys %q instead of %s; create it with kubectl create secret docker-registry",
				errdefs.ErrInvalidArgument, keys, corev1.DockerConfigJsonKey)
		}
		secret.Type = corev1.SecretTypeDockercfg
	}
	keychain, err := kubernetes.NewFromPullSecrets(context.Background(), []corev1.Secret{secret})
	if err != nil {
		// The text of err may contain parts of the secret.
		return Credentials{}, fmt.Errorf("%w: the secret is not a Docker configuration in JSON; "+
			"create it with kubectl create secret docker-registry", errdefs.ErrInvalidArgument)
	}
	hash := sha256.New()
	for _, key := range slices.Sorted(maps.Keys(data)) {
		fmt.Fprintf(hash, "%d:%s%d:%s", len(key), key, len(data[key]), data[key])
	}
	return Credentials{keychain: keychain, id: hex.EncodeToString(hash.Sum(nil))}, nil
}

// ReadCredentials reads credentials from a Docker config.json.
func ReadCredentials(path string) (Credentials, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Credentials{}, err
	}
	credentials, err := ParseCredentials(map[string]string{corev1.DockerConfigJsonKey: string(data)})
	if err != nil {
		return Credentials{}, fmt.Errorf("%s: %w", path, err)
	}
	return credentials, nil
}

// login is a user and a secret for one registry. The secret is a refresh token if user is empty.
type login struct{ user, secret string }

// dockerHub lists the names of Docker Hub: in Docker configurations, in image references, and as a host.
var dockerHub = []string{"index.docker.io", "docker.io", "registry-1.docker.io"}

// find returns the login for a repository on a host. It reports false if the credentials have none.
func (c Credentials) find(host, repository string) (login, bool) {
	if c.keychain == nil {
		return login{}, false
	}
	hosts := []string{host}
	if slices.Contains(dockerHub, host) {
		hosts = dockerHub
	}
	for _, name := range hosts {
		found, err := c.keychain.Resolve(resource{name, name + "/" + repository})
		if err != nil || found == authn.Anonymous {
			continue
		}
		config, err := authn.Authorization(context.Background(), found)
		if err != nil {
			continue
		}
		if config.IdentityToken != "" {
			return login{"", config.IdentityToken}, true
		}
		if config.Username != "" || config.Password != "" {
			return login{config.Username, config.Password}, true
		}
	}
	return login{}, false
}

// resource implements authn.Resource.
type resource struct{ registry, name string }

func (r resource) String() string      { return r.name }
func (r resource) RegistryStr() string { return r.registry }
