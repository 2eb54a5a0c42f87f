package overlaynode

import (
	"maps"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Kind and APIVersion are those of the objects.
const (
	Kind       = "OverlayNode"
	APIVersion = group + "/" + version

	group   = "overlay-csi.github.io"
	version = "v1alpha1"
)

// The kind's place in the API (charts/overlay-csi/crds/overlaynodes.yaml).
var (
	groupVersion = schema.GroupVersion{Group: group, Version: version}
	kind         = groupVersion.WithKind(Kind)
)

const resource = "overlaynodes"

// OverlayNode is how a controller reaches the driver of one node.
type OverlayNode struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   Spec   `json:"spec"`
	Status Status `json:"status,omitzero"`
}

// Spec is what the controller writes.
type Spec struct {
	// Node is the name of the Node.
	Node string `json:"node"`
	// NodeGoneSince is when a controller first saw that there is no such Node, nil while there is one.
	NodeGoneSince *metav1.Time `json:"nodeGoneSince,omitempty"`
	// Requests are the requests by volume handle. One that was answered stays for a while.
	Requests map[string]Request `json:"requests,omitempty"`
}

// Request asks the driver of a node to do something with a volume.
type Request struct {
	// ID is that of this request. It begins with a digest of the method and the body.
	ID     string `json:"id"`
	Method string `json:"method"`
	// Body is JSON. It is stored as text, because a merge patch would merge it with that of an earlier request.
	Body string `json:"body"`
	// PostedAt is when the request was written.
	PostedAt metav1.Time `json:"postedAt"`
	// ExpiresAt is when the request is carried out no more: nobody has repeated it. It is nil for one that is wanted in any case.
	ExpiresAt *metav1.Time `json:"expiresAt"`
}

// IsExpired reports whether the request is not to be carried out any more.
func (r Request) IsExpired() bool { return r.ExpiresAt != nil && time.Now().After(r.ExpiresAt.Time) }

// size returns about how many bytes the request takes in the object.
func (r Request) size() int { return len(r.Body) + requestOverhead }

// requestOverhead is about how many bytes a request takes beside its body.
const requestOverhead = 400

// Status is what the node writes.
type Status struct {
	// CapacityBytes is how many bytes the node can reserve for further volumes.
	CapacityBytes int64 `json:"capacityBytes,omitempty"`
	// ReportedAt is when the node last wrote the status.
	ReportedAt metav1.Time `json:"reportedAt,omitzero"`
	// PublicKey is the key that secrets in requests are sealed with, "" from a driver that takes none.
	PublicKey string `json:"publicKey,omitempty"`
	// Results are the answers by volume handle.
	Results map[string]Result `json:"results,omitempty"`
}

// Result is the answer to a request.
type Result struct {
	// ID is that of the request.
	ID string `json:"id"`
	// Code is a gRPC code, zero for OK. Message is that of an error.
	Code    uint32 `json:"code"`
	Message string `json:"message"`
	// Body is JSON.
	Body string `json:"body"`
}

// size returns about how many bytes the result takes in the object.
func (r Result) size() int { return len(r.Body) + len(r.Message) + requestOverhead }

// Answer returns the result for the request about a volume. ok is false as long as there is none.
func (n *OverlayNode) Answer(handle string) (result Result, ok bool) {
	request, requested := n.Spec.Requests[handle]
	result, answered := n.Status.Results[handle]
	return result, requested && answered && result.ID == request.ID
}

const (
	// silentAfter is after how long without a report a node counts as silent. A driver that runs reports more often.
	silentAfter = 30 * time.Minute
	// slowAfter is after how long without an answer to a request a node counts as silent.
	slowAfter = time.Minute
)

// IsSilent reports whether the node does not seem to have a driver that answers, or to be there.
func (n *OverlayNode) IsSilent() bool {
	if n.goneSince() != nil {
		return true
	}
	for handle, request := range n.Spec.Requests {
		if _, answered := n.Answer(handle); !answered && !request.IsExpired() && time.Since(request.PostedAt.Time) > slowAfter {
			return true
		}
	}
	return time.Since(n.Status.ReportedAt.Time) > silentAfter
}

// goneSince returns since when the node has been gone, nil if it is there or has reported since then.
func (n *OverlayNode) goneSince() *metav1.Time {
	since := n.Spec.NodeGoneSince
	if since != nil && n.Status.ReportedAt.After(since.Time) {
		return nil
	}
	return since
}

// DeepCopyObject is part of runtime.Object.
func (n *OverlayNode) DeepCopyObject() runtime.Object {
	copied := *n
	n.ObjectMeta.DeepCopyInto(&copied.ObjectMeta)
	copied.Spec.NodeGoneSince = n.Spec.NodeGoneSince.DeepCopy()
	// The values of the maps are replaced and never changed.
	copied.Spec.Requests = maps.Clone(n.Spec.Requests)
	copied.Status.Results = maps.Clone(n.Status.Results)
	return &copied
}

// OverlayNodeList is a list of the objects of all nodes.
type OverlayNodeList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []OverlayNode `json:"items"`
}

// DeepCopyObject is part of runtime.Object.
func (l *OverlayNodeList) DeepCopyObject() runtime.Object {
	copied := *l
	l.ListMeta.DeepCopyInto(&copied.ListMeta)
	copied.Items = make([]OverlayNode, len(l.Items))
	for i := range l.Items {
		copied.Items[i] = *l.Items[i].DeepCopyObject().(*OverlayNode)
	}
	return &copied
}
