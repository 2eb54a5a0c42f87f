package kubelet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Pod identifies a pod. Kubelet sends it to a driver whose CSIDriver object has podInfoOnMount.
type Pod struct {
	UID       string `json:"uid,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
}

// String returns namespace/name, or the UID if the name is unknown.
func (p Pod) String() string {
	if p.Name == "" {
		return p.UID
	}
	return p.Namespace + "/" + p.Name
}

// inlineHandle is the form of handles that kubelet makes up for inline volumes, one for each volume of a pod.
var inlineHandle = regexp.MustCompile(`^csi-[0-9a-f]{64}$`)

// IsInlineHandle reports whether a volume handle has the form of kubelet's for inline volumes.
func IsInlineHandle(id string) bool { return inlineHandle.MatchString(id) }

// Dir is kubelet's directory on this node (its --root-dir, /var/lib/kubelet).
type Dir string

// PodUID returns the UID of the pod that a path in kubelet's directory belongs to:
// <dir>/pods/<uid>/volumes/kubernetes.io~csi/<name>/mount. It returns "" for any other path.
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

// PodGone reports whether kubelet has removed the directory of this pod, which it does after the pod's last container and volume are
// gone. It returns false if that is unknown because kubelet's own directory is missing or cannot be read.
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

// validName returns an error if the name cannot be that of one directory entry.
func validName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("invalid name %q of a pod or volume", name)
	}
	return nil
}
