// Package access decides who may use the images and layers of a node: a pod may use them if a registry gave them to it before, or gives
// them to it now (Kubernetes, KEP-2535 "Ensure Secret Pulled Images").
//
// What registries accepted is kept in a table of salted hashes: for an image its digest, repository and login. A layer has the hashes of
// those who may have it in its own record.
package access

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Policy says for which images on the node credentials are verified. It has the values and meanings of kubelet's
// imagePullCredentialsVerificationPolicy (KubeletConfiguration v1beta1). Preloaded images are those that the operator prefetches.
type Policy string

// The policies.
const (
	NeverVerify                  Policy = "NeverVerify"
	NeverVerifyPreloadedImages   Policy = "NeverVerifyPreloadedImages"
	NeverVerifyAllowlistedImages Policy = "NeverVerifyAllowlistedImages"
	AlwaysVerify                 Policy = "AlwaysVerify"
)

// Policies returns the policies.
func Policies() []Policy {
	return []Policy{NeverVerify, NeverVerifyPreloadedImages, NeverVerifyAllowlistedImages, AlwaysVerify}
}

// Anonymous is the login of a request without one.
const Anonymous = "anonymous"

// Config configures a Verifier.
type Config struct {
	Policy Policy
	// Allowlist are the repositories of preloaded images that NeverVerifyAllowlistedImages does not verify. An entry may end with "/*".
	Allowlist []string
}

// Check returns ErrInvalidArgument if the configuration is invalid.
func (c Config) Check() error {
	if !slices.Contains(Policies(), c.Policy) {
		return fmt.Errorf("%w: unknown policy %q; use one of %q", errdefs.ErrInvalidArgument, c.Policy, Policies())
	}
	for _, pattern := range c.Allowlist {
		if name := strings.TrimSuffix(pattern, "/*"); name == "" || strings.Contains(name, "*") || strings.Contains(name, "@") {
			return fmt.Errorf("%w: %q in the list of images is neither registry/repository nor registry/path/*",
				errdefs.ErrInvalidArgument, pattern)
		}
	}
	if len(c.Allowlist) > 0 && c.Policy != NeverVerifyAllowlistedImages {
		return fmt.Errorf("%w: the list of images is for policy %s", errdefs.ErrInvalidArgument, NeverVerifyAllowlistedImages)
	}
	return nil
}

// allows reports whether the allowlist has a repository.
func (c Config) allows(repository string) bool {
	return slices.ContainsFunc(c.Allowlist, func(pattern string) bool {
		prefix, isPrefix := strings.CutSuffix(pattern, "*")
		return pattern == repository || isPrefix && strings.HasPrefix(repository, prefix)
	})
}

// Verifier remembers what registries accepted, and says who may use what.
type Verifier struct {
	config Config
	table  *table
	// public is the holder that stands for everybody.
	public ID
}

// NewVerifier returns a Verifier with a table in the file at path. Where that cannot be read, nothing was accepted.
func NewVerifier(path string, config Config) *Verifier {
	table := openTable(path)
	return &Verifier{config: config, table: table, public: table.hash("public layer")}
}

// Tenant is who uses an image.
type Tenant struct {
	// Host and Repository are those in the name of the image. Repository includes the host.
	Host, Repository string
	// Logins are those that the tenant has for the repository, without Anonymous.
	Logins []string
}

// MayUseImage reports whether a tenant may use an image on the node under the name of its repository. isPreloaded says whether the operator
// preloaded it from there.
func (v *Verifier) MayUseImage(image digest.Digest, tenant Tenant, isPreloaded bool) bool {
	isFree := v.config.Policy == NeverVerifyPreloadedImages ||
		v.config.Policy == NeverVerifyAllowlistedImages && v.config.allows(tenant.Repository)
	if v.config.Policy == NeverVerify || isPreloaded && isFree {
		return true
	}
	ids := []ID{v.imageID(image, tenant.Repository, Anonymous)}
	for _, login := range tenant.Logins {
		ids = append(ids, v.imageID(image, tenant.Repository, login))
	}
	return v.table.has(ids...)
}

// AcceptImage remembers that a registry gave the whole image to a login.
func (v *Verifier) AcceptImage(image digest.Digest, repository, login string) error {
	return v.table.add(v.imageID(image, repository, login))
}

func (v *Verifier) imageID(image digest.Digest, repository, login string) ID {
	return v.table.hash("image", image.String(), repository, login)
}

// MayUseLayer reports whether a tenant may use a layer on the node with these holders. It may if anybody may, if the layer came from the
// same repository, or if it came from the same registry with a login that the tenant has.
func (v *Verifier) MayUseLayer(holders []ID, tenant Tenant) bool {
	if v.config.Policy == NeverVerify || slices.Contains(holders, v.public) {
		return true
	}
	ids := []ID{v.repositoryID(tenant)}
	for _, login := range tenant.Logins {
		ids = append(ids, v.loginID(tenant, login))
	}
	return slices.ContainsFunc(ids, func(id ID) bool { return slices.Contains(holders, id) })
}

// LayerHolders returns the holders of a layer whose blob a registry sent whole to a login of a tenant. What a registry gives to everybody
// is public.
func (v *Verifier) LayerHolders(tenant Tenant, login string) []ID {
	if login == Anonymous {
		return []ID{v.public}
	}
	return []ID{v.repositoryID(tenant), v.loginID(tenant, login)}
}

// CommonHolders returns the holders of a blob whose parts were sent to different holders.
func (v *Verifier) CommonHolders(one, other []ID) []ID {
	switch {
	case slices.Contains(one, v.public):
		return other
	case slices.Contains(other, v.public):
		return one
	}
	return slices.DeleteFunc(slices.Clone(one), func(id ID) bool { return !slices.Contains(other, id) })
}

func (v *Verifier) repositoryID(tenant Tenant) ID {
	return v.table.hash("layer of repository", tenant.Repository)
}

func (v *Verifier) loginID(tenant Tenant, login string) ID {
	return v.table.hash("layer for login", tenant.Host, login)
}

// maxHolders is the maximum number of holders of a layer.
const maxHolders = 64

// AddHolders adds holders to those of a layer. If there are too many, the first ones are forgotten.
func AddHolders(holders, added []ID) []ID {
	holders = slices.DeleteFunc(slices.Clone(holders), func(id ID) bool { return slices.Contains(added, id) })
	holders = append(holders, added...)
	return holders[max(len(holders)-maxHolders, 0):]
}
