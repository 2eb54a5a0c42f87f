package overlaynode

import (
	"encoding/json"
	"maps"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Kind and APIVersion are those of the objects.
const (
	Kind       = "OverlayNode"
	APIVersion = "overlay-csi.github.io/v1alpha1"
)

// The kind's place in the API (charts/overlay-csi/crds/overlaynodes.yaml).
var (
	groupVersion = schema.GroupVersion{Group: "overlay-csi.github.io", Version: "v1alpha1"}
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
	// Requests are the requests by volume handle. One that is answered stays until newer ones are answered.
	Requests map[string]Request `json:"requests,omitempty"`
}

// Request asks the driver of a node to do something with a volume.
type Request struct {
	// ID is that of this request. One with the same content that is asked again after an error has another ID.
	ID     string          `json:"id"`
	Method string          `json:"method"`
	Body   json.RawMessage `json:"body,omitempty"`
	// PostedAt is when the request was written.
	PostedAt metav1.Time `json:"postedAt"`
}

// Status is what the node writes.
type Status struct {
	// CapacityBytes is how many bytes the node can reserve for further volumes.
	CapacityBytes int64 `json:"capacityBytes,omitempty"`
	// ReportedAt is when the node last wrote the status.
	ReportedAt metav1.Time `json:"reportedAt,omitzero"`
	// Results are the answers by volume handle.
	Results map[string]Result `json:"results,omitempty"`
}

// Result is the answer to a request.
type Result struct {
	// ID is that of the request.
	ID string `json:"id"`
	// Code is a gRPC code, zero for OK. Message is that of an error.
	Code    uint32          `json:"code"`
	Message string          `json:"message,omitempty"`
	Body    json.RawMessage `json:"body,omitempty"`
}

// answer returns the result for the request about a volume. ok is false as long as there is none.
func (n *OverlayNode) answer(handle string) (result Result, ok bool) {
	request, requested := n.Spec.Requests[handle]
	result, answered := n.Status.Results[handle]
	return result, requested && answered && result.ID == request.ID
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
