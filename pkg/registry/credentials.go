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

// Credentials are the logins for registries. The zero value is anonymous.
type Credentials struct {
	keychain authn.Keychain
	id       string
}

// ID tells credentials apart without disclosing them.
func (c Credentials) ID() string { return c.id }

// ParseCredentials reads the data of a Secret of type kubernetes.io/dockerconfigjson, or of the older
// kubernetes.io/dockercfg. No data is no credentials. Entries match images as those of a pod's imagePullSecrets do: the
// longest match of registry and repository wins, and the registry's name may have `*` in it.
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
			return Credentials{}, fmt.Errorf("%w: the secret has no key %s (it has %v); make it with kubectl create secret docker-registry", errdefs.ErrInvalidArgument, corev1.DockerConfigJsonKey, slices.Sorted(maps.Keys(data)))
		}
		secret.Type = corev1.SecretTypeDockercfg
	}
	keychain, err := kubernetes.NewFromPullSecrets(context.Background(), []corev1.Secret{secret})
	if err != nil {
		// The error would disclose the secret.
		return Credentials{}, fmt.Errorf("%w: the secret is not a Docker configuration in JSON; make it with kubectl create secret docker-registry", errdefs.ErrInvalidArgument)
	}
	hash := sha256.New()
	for _, key := range slices.Sorted(maps.Keys(data)) {
		fmt.Fprintf(hash, "%d:%s%d:%s", len(key), key, len(data[key]), data[key])
	}
	return Credentials{keychain: keychain, id: hex.EncodeToString(hash.Sum(nil))}, nil
}

// ReadCredentials reads the credentials in a Docker config.json.
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

// login is a user name and a secret for one registry. A secret without a user is a refresh token.
type login struct{ user, secret string }

// dockerHub are the names of one registry: in image references, in Docker configurations, and the host that serves it.
var dockerHub = []string{"index.docker.io", "docker.io", "registry-1.docker.io"}

// find looks for the login for a repository on a host.
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

// resource is an authn.Resource.
type resource struct{ registry, name string }

func (r resource) String() string      { return r.name }
func (r resource) RegistryStr() string { return r.registry }
