// Package kubelet knows what the driver has to know of kubelet: where it keeps the volumes of a pod, when it has
// mounted one, whether a pod is still there, and how a CSI driver registers with it.
package kubelet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Pod names a pod as kubelet gives it to a driver whose CSIDriver has podInfoOnMount.
type Pod struct {
	UID       string `json:"uid,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
}

// String is namespace/name, as Kubernetes writes pods.
func (p Pod) String() string {
	if p.Name == "" {
		return p.UID
	}
	return p.Namespace + "/" + p.Name
}

// Dir is kubelet's directory on this node (its --root-dir, /var/lib/kubelet).
type Dir string

// PodUID returns the UID of the pod that a path within kubelet's directory belongs to:
// <dir>/pods/<uid>/volumes/kubernetes.io~csi/<name>/mount. It is "" for any other path.
func (d Dir) PodUID(path string) string {
	rest, ok := strings.CutPrefix(path, filepath.Join(string(d), "pods")+"/")
	if !ok {
		return ""
	}
	uid, rest, ok := strings.Cut(rest, "/")
	if !ok || rest == "" || validName(uid) != nil {
		return ""
	}
	return uid
}

// PodGone reports whether kubelet has no directory of this pod any more, which it removes only after the pod's last
// container and volume. Where that cannot be told (kubelet's directory itself is not there, or cannot be read), the
// answer is false.
func (d Dir) PodGone(uid string) bool {
	if validName(uid) != nil {
		return false
	}
	pods := filepath.Join(string(d), "pods")
	if info, err := os.Stat(pods); err != nil || !info.IsDir() {
		return false
	}
	_, err := os.Lstat(filepath.Join(pods, uid))
	return errors.Is(err, fs.ErrNotExist)
}

// validName refuses what cannot be the name of one directory entry.
func validName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%q is no name of a pod or volume", name)
	}
	return nil
}
