package integration

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
	"github.com/overlay-csi/overlay-csi/test/registrytest/distribution"
)

// pushPassword is not to be in any output or log.
const pushPassword = "hunter2-of-the-registry"

// TestCommitPush keeps what was written to claims as images in a registry that wants a login, and sees it again in volumes of the images.
func TestCommitPush(t *testing.T) {
	node := startNode(t)
	r := startRegistry(t, node, registrytest.Options{
		User: "u", Password: pushPassword, Handler: distribution.New(t.Context(), true),
	})
	login := filepath.Join(t.TempDir(), "config.json")
	must(t, os.WriteFile(login, []byte(r.DockerConfig("u", pushPassword)), 0o600))
	pushImage(t, r, "team/base:1",
		map[string]string{"f": "layer", "gone": "layer", "d/g": "layer", "d/h": "layer", "again/below": "layer", "attributes/f": "layer"},
		map[string]string{"d/g": "upper layer", "linked": "layer", "deep/a/b/c": "layer"})
	_, err := node.Layer("base", map[string]string{
		"f": "layer", "gone": "layer", "d/g": "layer", "d/h": "layer", "again/below": "layer", "attributes/f": "layer", "linked": "layer",
		"deep/a/b/c": "layer",
	})
	must(t, err)
	for kind, c := range map[string]struct {
		layers string
		// pushed is how many layers the pushed image has, and below its annotation of what belongs below it.
		pushed int
		below  string
	}{
		"image":     {"oci://" + r.Host + "/team/base:1", 3, ""},
		"directory": {"dir://layers/base", 1, "dir://layers/base"},
	} {
		t.Run(kind, func(t *testing.T) {
			pod := newPod(t, node, "writer-"+kind)
			v := pushVolume(r, "claim-"+kind, c.layers)
			target := publish(t, pod, v)
			writeOddities(t, target)
			want := entriesOf(t, target)
			unpublish(t, pod, v)
			image := r.Host + "/team/" + kind + ":1"
			push := func(secret string) (string, error) {
				return overlayctl(t, node, "commit", v.ID, "--push", image, "--secret", secret)
			}
			if kind == "image" {
				wantNoPush(t, r, push)
				interruptPush(t, node, r, func() (string, error) { return push(login) })
			}
			output, err := push(login)
			if err != nil || !strings.HasPrefix(output, image+" ") {
				t.Fatalf("push: %v\n%s", err, output)
			}
			named, err := name.ParseReference(image, name.Insecure)
			must(t, err)
			made, err := remote.Image(named, remote.WithAuth(authn.FromConfig(authn.AuthConfig{Username: "u", Password: pushPassword})))
			must(t, err)
			manifest, err := made.Manifest()
			must(t, err)
			if below := manifest.Annotations["io.github.overlay-csi.layers"]; len(manifest.Layers) != c.pushed || below != c.below {
				t.Errorf("the image has %d layers and is for those above %q", len(manifest.Layers), below)
			}
			if digest, err := made.Digest(); err != nil || !strings.Contains(output, digest.String()) {
				t.Errorf("%s has the digest %s (%v), and not %q", image, digest, err, output)
			}
			layers := "oci://" + image
			if c.below != "" {
				layers += "\n" + c.below
			}
			reader, again := newPod(t, node, "reader-"+kind), pushVolume(r, "again-"+kind, layers)
			wantEntries(t, entriesOf(t, publish(t, reader, again)), want)
			unpublish(t, reader, again)
			archive := "archive-" + kind + ".tar"
			output, err = overlayctl(t, node, "commit", v.ID, "--output", filepath.Join(node.LayerDir, archive), "--format", "oci",
				"--name", "team/app:2", "--secret", login)
			if err != nil {
				t.Fatalf("write an archive: %v\n%s", err, output)
			}
			layers = "archive://layers/" + archive
			if c.below != "" {
				layers += "\n" + c.below
			}
			again = pushVolume(r, "archived-"+kind, layers)
			wantEntries(t, entriesOf(t, publish(t, reader, again)), want)
			unpublish(t, reader, again)
			// The volume goes on with what it had.
			wantEntries(t, entriesOf(t, publish(t, pod, v)), want)
			unpublish(t, pod, v)
		})
	}
	mounts, err := drivertest.Mounts(node.Dir)
	must(t, err)
	for _, mount := range mounts {
		if mount.FSType == "overlay" {
			t.Errorf("an overlay is left at %s", mount.Mountpoint)
		}
	}
	if _, err := overlayctl(t, node, "commit", "claim-image", "--output", "-", "--format", "oci"); err == nil {
		t.Error("an archive was written without a login for the image below")
	}
	if log := node.Log(); strings.Contains(log, pushPassword) {
		t.Error("the password is in the log")
	}
}

// pushVolume is a claim on layers of a registry.
func pushVolume(r *registrytest.Registry, id, layers string) drivertest.Volume {
	return drivertest.Volume{Name: id, ID: id, Claim: true, Attributes: map[string]string{"layers": layers},
		Secrets: map[string]string{".dockerconfigjson": r.DockerConfig("u", pushPassword)}}
}

// writeOddities changes what is in the layers of TestCommitPush in all ways that a layer has something of its own for.
func writeOddities(t *testing.T, dir string) {
	t.Helper()
	at := func(path string) string { return filepath.Join(dir, path) }
	must(t, os.Remove(at("gone")))
	write(t, at("f"), "pod")
	must(t, os.Rename(at("d"), at("moved")))
	must(t, os.Remove(at("moved/h")))
	must(t, os.RemoveAll(at("again")))
	must(t, os.Mkdir(at("again"), 0o750))
	write(t, at("again/new"), "pod")
	must(t, os.Link(at("linked"), at("deep/link")))
	write(t, at("one"), "two names")
	must(t, os.Link(at("one"), at("deep/a/other")))
	must(t, os.Symlink("../outside", at("symlink")))
	must(t, syscall.Mkfifo(at("fifo"), 0o640))
	must(t, os.Chown(at("one"), 1000, 1001))
	must(t, os.Chmod(at("one"), 0o4755))
	must(t, unix.Lsetxattr(at("one"), "user.key", []byte("value\x00\xff"), 0))
	must(t, unix.Lsetxattr(at("attributes"), "user.key", []byte("of a directory"), 0))
	must(t, os.MkdirAll(at("deep/"+strings.Repeat("d", 200)+"/"+strings.Repeat("e", 200)), 0o755))
	write(t, at("deep/"+strings.Repeat("d", 200)+"/"+strings.Repeat("e", 200)+"/\xff\n"), "odd name")
	must(t, os.Chtimes(at("one"), time.Unix(1_500_000_000, 123_456_789), time.Unix(1_500_000_000, 123_456_789)))
}

// entriesOf describes all that is beneath a directory, by path.
func entriesOf(t *testing.T, root string) map[string]string {
	t.Helper()
	entries, first := map[string]string{}, map[uint64]string{}
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var stat unix.Stat_t
		if err := unix.Lstat(path, &stat); err != nil {
			return err
		}
		relative := strings.TrimPrefix(path, root)
		text := fmt.Sprintf("mode %o, owner %d:%d", stat.Mode, stat.Uid, stat.Gid)
		if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
			// A directory that only something in it has changed has no time of its own in a layer.
			text += fmt.Sprintf(", time %d.%d", stat.Mtim.Sec, stat.Mtim.Nsec)
			if first[stat.Ino] == "" {
				first[stat.Ino] = relative
			}
			text += ", file of " + first[stat.Ino]
		}
		switch stat.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(", content %x", sha256.Sum256(content))
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += ", to " + target
		}
		buffer := make([]byte, 4096)
		n, err := unix.Llistxattr(path, buffer)
		if err != nil {
			return err
		}
		names := strings.FieldsFunc(string(buffer[:n]), func(r rune) bool { return r == 0 })
		for _, name := range slices.Sorted(slices.Values(names)) {
			value := make([]byte, 4096)
			n, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(", %s=%q", name, value[:n])
		}
		entries[relative] = text
		return nil
	}))
	return entries
}

func wantEntries(t *testing.T, got, want map[string]string) {
	t.Helper()
	all := maps.Clone(want)
	maps.Copy(all, got)
	for _, path := range slices.Sorted(maps.Keys(all)) {
		if got[path] != want[path] {
			t.Errorf("%q is\n%q instead of\n%q", path, got[path], want[path])
		}
	}
}

// wantNoPush pushes with logins that the registry does not take.
func wantNoPush(t *testing.T, r *registrytest.Registry, push func(secret string) (string, error)) {
	t.Helper()
	for name, c := range map[string]struct {
		secret string
		words  []string
	}{
		"wrong password": {r.DockerConfig("u", "wrong-"+pushPassword), []string{`user "u"`, "check that the secret has a login for " + r.Host}},
		"no login":       {`{"auths":{}}`, []string{"without credentials", "check that the secret has a login for " + r.Host}},
		"not JSON":       {`{"auths":"` + pushPassword, []string{"Docker configuration in JSON"}},
	} {
		secret := filepath.Join(t.TempDir(), "config.json")
		must(t, os.WriteFile(secret, []byte(c.secret), 0o600))
		output, err := push(secret)
		if err == nil {
			t.Errorf("%s: it was pushed", name)
		}
		for _, word := range c.words {
			if !strings.Contains(output, word) {
				t.Errorf("%s: %q does not say %q", name, output, word)
			}
		}
		if strings.Contains(output, pushPassword) {
			t.Errorf("%s: the password is in %q", name, output)
		}
	}
}

// interruptPush kills the driver when the first blob of a push has come to the registry.
func interruptPush(t *testing.T, node *drivertest.Node, r *registrytest.Registry, push func() (string, error)) {
	t.Helper()
	arrived, held := make(chan struct{}, 100), make(chan struct{})
	r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if request.Method == http.MethodPut && strings.Contains(request.URL.Path, "/blobs/uploads/") {
			arrived <- struct{}{}
			<-held
		}
		return false
	})
	type result struct {
		output string
		err    error
	}
	done := make(chan result, 1)
	go func() {
		output, err := push()
		done <- result{output, err}
	}()
	<-arrived
	must(t, node.Kill())
	close(held)
	r.SetFault(nil)
	ended := <-done
	if ended.err == nil || !strings.Contains(ended.output, "push again") {
		t.Errorf("interrupted: %v\n%s", ended.err, ended.output)
	}
	start(t, node)
}
