package overlaynode

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"path"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

const (
	testNamespace = "storage"
	testDriver    = "overlay-csi.github.io"
)

// apiServer serves OverlayNodes as an API server does: it counts versions, sends watches what changes, and has the status apart from the
// spec. The tests with a real one are in test/e2e.
type apiServer struct {
	t      *testing.T
	config *rest.Config

	mu       sync.Mutex
	version  int
	objects  map[string]*OverlayNode
	watchers map[chan []byte]string
	// writes counts the writes by what they are.
	writes map[string]int
	// refuse has each write answered with an error.
	refuse bool
	// lag is by how much what watches are sent is late.
	lag time.Duration
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	s := &apiServer{t: t, objects: map[string]*OverlayNode{}, watchers: map[chan []byte]string{}, writes: map[string]int{}}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	t.Cleanup(server.CloseClientConnections)
	s.config = &rest.Config{Host: server.URL}
	return s
}

func (s *apiServer) client() *Client {
	client, err := NewClient(s.config, testNamespace, testDriver)
	if err != nil {
		s.t.Fatal(err)
	}
	return client
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	collection := "/apis/" + APIVersion + "/namespaces/" + testNamespace + "/overlaynodes"
	rest, ok := strings.CutPrefix(r.URL.Path, collection)
	name, subresource := path.Split(strings.TrimPrefix(rest, "/"))
	if name == "" {
		name, subresource = subresource, ""
	}
	name = strings.TrimSuffix(name, "/")
	switch {
	case !ok:
		s.fail(w, http.StatusNotFound, metav1.StatusReasonNotFound)
	case r.URL.Query().Get("watch") != "":
		s.watch(w, r)
	case r.Method == http.MethodGet:
		s.list(w, r)
	default:
		s.write(w, r, name, subresource)
	}
}

func (s *apiServer) fail(w http.ResponseWriter, code int, reason metav1.StatusReason) {
	w.WriteHeader(code)
	status := metav1.Status{Status: metav1.StatusFailure, Reason: reason, Code: int32(code)}
	status.Kind, status.APIVersion = "Status", "v1"
	s.encode(w, status)
}

func (s *apiServer) encode(w io.Writer, object any) {
	// A client that has gone gets no answer.
	_ = json.NewEncoder(w).Encode(object)
}

func selected(r *http.Request) string {
	return strings.TrimPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name=")
}

func (s *apiServer) list(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := OverlayNodeList{TypeMeta: metav1.TypeMeta{Kind: Kind + "List", APIVersion: APIVersion}}
	list.ResourceVersion = strconv.Itoa(s.version)
	for name, object := range s.objects {
		if only := selected(r); only == "" || only == name {
			list.Items = append(list.Items, *object)
		}
	}
	s.encode(w, list)
}

func (s *apiServer) watch(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("sendInitialEvents") == "true" {
		// The client lists then.
		s.fail(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid)
		return
	}
	events := make(chan []byte, 1000)
	s.mu.Lock()
	s.watchers[events] = selected(r)
	if r.URL.Query().Get("resourceVersion") != strconv.Itoa(s.version) {
		// Something was written between the list and the watch.
		for name, object := range s.objects {
			if only := selected(r); only == "" || only == name {
				events <- event("MODIFIED", object)
			}
		}
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.watchers, events)
		s.mu.Unlock()
	}()
	w.(http.Flusher).Flush()
	for {
		select {
		case event := <-events:
			s.mu.Lock()
			lag := s.lag
			s.mu.Unlock()
			time.Sleep(lag)
			if _, err := w.Write(event); err != nil {
				return
			}
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

func event(kind string, object *OverlayNode) []byte {
	encoded, err := json.Marshal(map[string]any{"type": kind, "object": object})
	if err != nil {
		panic(err)
	}
	return append(encoded, '\n')
}

func (s *apiServer) write(w http.ResponseWriter, r *http.Request, name, subresource string) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writes[r.Method+subresource]++
	if s.refuse {
		s.fail(w, http.StatusInternalServerError, metav1.StatusReasonInternalError)
		return
	}
	old := s.objects[name]
	switch r.Method {
	case http.MethodPost:
		object := &OverlayNode{}
		if err := json.Unmarshal(body, object); err != nil {
			s.fail(w, http.StatusBadRequest, metav1.StatusReasonBadRequest)
			return
		}
		if s.objects[object.Name] != nil {
			s.fail(w, http.StatusConflict, metav1.StatusReasonAlreadyExists)
			return
		}
		object.CreationTimestamp = metav1.Now()
		s.store(w, "ADDED", object)
	case http.MethodPatch:
		if old == nil {
			s.fail(w, http.StatusNotFound, metav1.StatusReasonNotFound)
			return
		}
		object, err := merged(old, body)
		if err != nil {
			s.fail(w, http.StatusBadRequest, metav1.StatusReasonBadRequest)
			return
		}
		if subresource == "status" {
			object.Spec = old.Spec
		} else {
			object.Status = old.Status
		}
		s.store(w, "MODIFIED", object)
	case http.MethodDelete:
		if old == nil {
			s.fail(w, http.StatusNotFound, metav1.StatusReasonNotFound)
			return
		}
		options := metav1.DeleteOptions{}
		if err := json.Unmarshal(body, &options); err != nil || *options.Preconditions.ResourceVersion != old.ResourceVersion {
			s.fail(w, http.StatusConflict, metav1.StatusReasonConflict)
			return
		}
		delete(s.objects, name)
		s.version++
		s.send(event("DELETED", old), name)
		s.encode(w, old)
	}
}

func merged(old *OverlayNode, patch []byte) (*OverlayNode, error) {
	before, err := json.Marshal(old)
	if err != nil {
		return nil, err
	}
	after, err := jsonpatch.MergePatch(before, patch)
	if err != nil {
		return nil, err
	}
	object := &OverlayNode{}
	return object, json.Unmarshal(after, object)
}

func (s *apiServer) store(w io.Writer, kind string, object *OverlayNode) {
	s.version++
	object.ResourceVersion = strconv.Itoa(s.version)
	s.objects[object.Name] = object
	s.send(event(kind, object), object.Name)
	s.encode(w, object)
}

func (s *apiServer) send(event []byte, name string) {
	for events, only := range s.watchers {
		if only == "" || only == name {
			events <- event
		}
	}
}

// get returns the object of a node.
func (s *apiServer) get(node string) *OverlayNode {
	s.mu.Lock()
	defer s.mu.Unlock()
	if object := s.objects[node+"."+testDriver]; object != nil {
		return object.DeepCopyObject().(*OverlayNode)
	}
	return nil
}

func (s *apiServer) count(write string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writes[write]
}

// setRefuse has the server refuse writes, or take them again.
func (s *apiServer) setRefuse(refuse bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuse = refuse
}
