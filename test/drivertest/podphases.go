package drivertest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// PodPhases is an API server that knows the phases of pods, and nothing else.
type PodPhases struct {
	server *httptest.Server

	mu     sync.Mutex
	phases map[string]corev1.PodPhase // by UID
	uids   map[string]string          // by name
}

// NewPodPhases starts the API server. The caller closes it.
func NewPodPhases() *PodPhases {
	p := &PodPhases{phases: map[string]corev1.PodPhase{}, uids: map[string]string{}}
	p.server = httptest.NewServer(http.HandlerFunc(p.serve))
	return p
}

// Close ends the API server.
func (p *PodPhases) Close() { p.server.Close() }

// Kubeconfig writes a kubeconfig file of the API server into dir, and returns its path.
func (p *PodPhases) Kubeconfig(dir string) (string, error) {
	path := filepath.Join(dir, "kubeconfig")
	config := fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "test",
"clusters": [{"name": "test", "cluster": {"server": %q}}], "contexts": [{"name": "test", "context": {"cluster": "test"}}]}`, p.server.URL)
	return path, os.WriteFile(path, []byte(config), 0o600)
}

// Set says in which phase a pod is from now on.
func (p *PodPhases) Set(pod *Pod, phase corev1.PodPhase) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.uids[pod.Name], p.phases[pod.UID] = pod.UID, phase
}

func (p *PodPhases) serve(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	name := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	uid, ok := p.uids[name]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure",
			Reason: metav1.StatusReasonNotFound, Code: http.StatusNotFound})
		return
	}
	pod := corev1.Pod{TypeMeta: metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"}}
	pod.Name, pod.UID = name, types.UID(uid)
	pod.Status.Phase = p.phases[uid]
	_ = json.NewEncoder(w).Encode(pod)
}
