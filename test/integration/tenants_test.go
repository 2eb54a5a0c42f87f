package integration

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestNodeCredentialsOfNamespaces limits the node's credentials to a namespace.
func TestNodeCredentialsOfNamespaces(t *testing.T) {
	node := newNode(t)
	r := startRegistry(t, node, registrytest.Options{TLS: true, User: "u", Password: "p"})
	config := filepath.Join(node.Dir, "config.json")
	must(t, os.WriteFile(config, []byte(r.DockerConfig("u", "p")), 0o600))
	node.AddArgs("--registry-config="+config, "--registry-config-namespaces=trusted,other")
	start(t, node)
	ref := pushImage(t, r, "team/a:1", map[string]string{"f": "private"})
	create := func(name, namespace string) error {
		_, err := node.Controller().CreateVolume(timeout(t), &csi.CreateVolumeRequest{
			Name:               name,
			Parameters:         map[string]string{"layers": "oci://" + r.Host + "/team/a:1", "csi.storage.k8s.io/pvc/namespace": namespace},
			VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(readWriteOnce)},
		})
		return err
	}
	for _, namespace := range []string{"default", "", "trusted"} {
		pod := newPod(t, node, "pod-of-"+namespace)
		v := inline("layers", ref, "csi.storage.k8s.io/pod.namespace", namespace)
		target, err := pod.Publish(timeout(t), v)
		created := create("claim-of-"+namespace, namespace)
		if namespace != "trusted" {
			wantCode(t, err, codes.Unauthenticated, namespace, "may not use the node's")
			wantCode(t, created, codes.Unauthenticated, namespace, "may not use the node's")
			continue
		}
		must(t, err)
		must(t, created)
		wantFile(t, filepath.Join(target, "f"), "private")
		unpublish(t, pod, v)
	}
}

// secretOf is a volume's secret with a login for a registry.
func secretOf(r *registrytest.Registry, user, password string) map[string]string {
	return map[string]string{".dockerconfigjson": r.DockerConfig(user, password)}
}

// TestImageOnTheNodeNeedsCredentials has a private image on the node.
func TestImageOnTheNodeNeedsCredentials(t *testing.T) {
	node := startNode(t)
	r := startRegistry(t, node, registrytest.Options{TLS: true, User: "u", Password: "p"})
	ref := pushImage(t, r, "team/a:1", map[string]string{"f": "private"})
	with := func(name string, secrets map[string]string) (*drivertest.Pod, drivertest.Volume) {
		v := inline("layers", ref)
		v.Secrets = secrets
		return newPod(t, node, name), v
	}
	right, wrong := secretOf(r, "u", "p"), secretOf(r, "u", "wrong")
	owner, v := with("owner", right)
	wantFile(t, filepath.Join(publish(t, owner, v), "f"), "private")
	refused := func(when string, code codes.Code) {
		t.Helper()
		for name, secrets := range map[string]map[string]string{"none": nil, "wrong": wrong} {
			pod, v := with(name+"-"+when, secrets)
			_, err := pod.Publish(timeout(t), v)
			wantCode(t, err, code, r.Host)
		}
	}
	refused("with the registry", codes.Unauthenticated)
	must(t, node.Stop())
	start(t, node)
	refused("after a restart", codes.Unauthenticated)
	r.Close()
	refused("without the registry", codes.Unavailable)
	again, other := with("again", right)
	wantFile(t, filepath.Join(publish(t, again, other), "f"), "private")
	unpublish(t, again, other)

	// A node that was down has lost its mounts. The pod's own volume needs no registry, although its secret was renewed.
	must(t, node.Kill())
	must(t, drivertest.UnmountBeneath(node.KubeletDir))
	must(t, os.Remove(filepath.Join(node.DataRoot, "access")))
	start(t, node)
	v.Secrets = secretOf(r, "u", "renewed")
	wantFile(t, filepath.Join(publish(t, owner, v), "f"), "private")
	unpublish(t, owner, v)
	// What was accepted is lost: the registry is asked.
	lost, v := with("lost", right)
	_, err := lost.Publish(timeout(t), v)
	wantCode(t, err, codes.Unavailable, r.Host)
}

// TestPublicImageOnTheNodeNeedsNone has an image on the node that a registry gives to everybody.
func TestPublicImageOnTheNodeNeedsNone(t *testing.T) {
	node := startNode(t)
	r := startRegistry(t, node, registrytest.Options{})
	ref := pushImage(t, r, "team/a:1", map[string]string{"f": "public"})
	pod := newPod(t, node, "first")
	publish(t, pod, inline("layers", ref))
	r.Close()
	must(t, node.Kill())
	start(t, node)
	for name, secrets := range map[string]map[string]string{"none": nil, "any": secretOf(r, "u", "p")} {
		v := inline("layers", ref)
		v.Secrets = secrets
		second := newPod(t, node, name)
		wantFile(t, filepath.Join(publish(t, second, v), "f"), "public")
		unpublish(t, second, v)
	}
	unpublish(t, pod, inline("layers", ref))
}

// TestImageUnderAnotherName names the digest of a private image in a registry that says that it has the image.
func TestImageUnderAnotherName(t *testing.T) {
	node := startNode(t)
	r := startRegistry(t, node, registrytest.Options{TLS: true, User: "u", Password: "p"})
	ref := pushImage(t, r, "team/a:1", map[string]string{"f": "private"})
	v := inline("layers", ref)
	v.Secrets = secretOf(r, "u", "p")
	publish(t, newPod(t, node, "owner"), v)
	_, id, _ := strings.Cut(ref, "@")
	evil := startRegistry(t, node, registrytest.Options{})
	evil.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
		w.Header().Set("Docker-Content-Digest", id)
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		w.Header().Set("Content-Length", "2")
		if request.Method == http.MethodGet {
			fmt.Fprint(w, "{}")
		}
		return true
	})
	for _, ref := range []string{"oci://" + evil.Host + "/x@" + id, "oci://" + evil.Host + "/x:1"} {
		target, err := newPod(t, node, "thief").Publish(timeout(t), inline("layers", ref))
		if err == nil {
			wantAbsent(t, filepath.Join(target, "f"))
		}
		wantCode(t, err, codes.FailedPrecondition, evil.Host)
	}
}

// TestLayerInAnotherImage names a layer of a private image in an image of a registry that the tenant runs himself.
func TestLayerInAnotherImage(t *testing.T) {
	for _, c := range []struct{ name, policy string }{{"default", ""}, {"never", "NeverVerify"}} {
		t.Run(c.name, func(t *testing.T) {
			var args []string
			if c.policy != "" {
				args = append(args, "--image-pull-credentials-verification-policy="+c.policy)
			}
			node := startNode(t, args...)
			r := startRegistry(t, node, registrytest.Options{TLS: true, User: "u", Password: "p"})
			private, err := registrytest.Layer(registrytest.File("f", "private"))
			must(t, err)
			blob, err := private.Digest()
			must(t, err)
			image, err := registrytest.Image(private)
			must(t, err)
			v := inline("layers", pushAny(t, r, "team/a:1", image))
			v.Secrets = secretOf(r, "u", "p")
			publish(t, newPod(t, node, "owner"), v)

			evil := startRegistry(t, node, registrytest.Options{})
			own, err := registrytest.Layer(registrytest.File("g", "own"))
			must(t, err)
			byBlob, err := registrytest.Image(own, private)
			must(t, err)
			// A blob of his own, that the configuration says is the other layer.
			byDiffID, err := registrytest.Image(own)
			must(t, err)
			config, err := byDiffID.ConfigFile()
			must(t, err)
			config = config.DeepCopy()
			diffID, err := private.DiffID()
			must(t, err)
			config.RootFS.DiffIDs = []v1.Hash{diffID}
			byDiffID, err = mutate.ConfigFile(byDiffID, config)
			must(t, err)
			refs := map[string]string{
				"blob": pushAny(t, evil, "blob:1", byBlob), "diff ID": pushAny(t, evil, "diffid:1", byDiffID),
			}
			// He says that he has the blob, and does not send it.
			evil.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
				if !registrytest.IsBlob(request, blob.Hex) {
					return false
				}
				http.Error(w, "", http.StatusNotFound)
				return true
			})
			for name, ref := range refs {
				target, err := newPod(t, node, "thief").Publish(timeout(t), inline("layers", ref))
				if c.policy != "" {
					must(t, err)
					wantFile(t, filepath.Join(target, "f"), "private")
					continue
				}
				wantCode(t, err, map[string]codes.Code{"blob": codes.NotFound, "diff ID": codes.FailedPrecondition}[name], evil.Host)
			}
			// Who has the content gets the layer. It is downloaded once more, and not unpacked again.
			evil.SetFault(nil)
			evil.Requests()
			layers, err := node.Admin().Layers(timeout(t))
			must(t, err)
			for _, name := range []string{"first", "second"} {
				wantFile(t, filepath.Join(publish(t, newPod(t, node, name), inline("layers", refs["blob"])), "f"), "private")
			}
			downloads := 0
			for _, request := range evil.Requests() {
				if strings.HasPrefix(request, "GET ") && strings.Contains(request, "/blobs/"+blob.String()) {
					downloads++
				}
			}
			if want := map[string]int{"": 1}[c.policy]; downloads != want {
				t.Errorf("the layer was downloaded %d times, want %d", downloads, want)
			}
			after, err := node.Admin().Layers(timeout(t))
			must(t, err)
			for _, layer := range layers {
				if !slices.ContainsFunc(after, func(l api.Layer) bool { return l.DiffID == layer.DiffID && l.Created.Equal(layer.Created) }) {
					t.Errorf("layer %s was made again", layer.DiffID)
				}
			}
		})
	}
}

// TestPrefetchedImageIsForEverybody has an image that the operator prefetched, with each policy.
func TestPrefetchedImageIsForEverybody(t *testing.T) {
	for policy, c := range map[string]struct{ list, code string }{
		"NeverVerifyPreloadedImages":   {"", ""},
		"NeverVerifyAllowlistedImages": {"/team/*", ""},
		"AlwaysVerify":                 {"", "refused"},
	} {
		t.Run(policy, func(t *testing.T) {
			node := newNode(t)
			r := startRegistry(t, node, registrytest.Options{User: "u", Password: "p"})
			config := filepath.Join(node.Dir, "config.json")
			must(t, os.WriteFile(config, []byte(r.DockerConfig("u", "p")), 0o600))
			ref := pushImage(t, r, "team/a:1", map[string]string{"f": "f"})
			node.AddArgs("--prefetch="+r.Host+"/team/a:1", "--registry-config="+config, "--registry-config-namespaces=",
				"--image-pull-credentials-verification-policy="+policy)
			if c.list != "" {
				node.AddArgs("--preloaded-images-verification-allowlist=" + r.Host + c.list)
			}
			start(t, node)
			eventually(t, "the image is prefetched", func() bool { return strings.Contains(node.Log(), "Image prefetched") })
			_, err := newPod(t, node, "pod").Publish(timeout(t), inline("layers", ref))
			if c.code == "" {
				must(t, err)
			} else {
				wantCode(t, err, codes.Unauthenticated, r.Host)
			}
		})
	}
}
