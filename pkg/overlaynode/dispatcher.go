package overlaynode

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

const (
	// maxWaiting is how many requests of a node may be without an answer.
	maxWaiting = 128
	// keepAnswered is how many answered requests a node's object keeps. A controller that takes over finds in them what the one before has
	// begun.
	keepAnswered = 8
	// maxBody is the maximum size of a request's body in bytes.
	maxBody = 64 << 10
)

// Dispatcher hands requests to the drivers of nodes. Several may do that at the same time.
type Dispatcher struct {
	client   *Client
	informer cache.SharedIndexInformer
	// objects are those of the informer, or what this dispatcher has written since.
	objects cache.MutationCache
	// begin has the informer run. A controller that is not the leader gets no requests, and watches nothing.
	begin func()
	begun atomic.Bool

	mu sync.Mutex
	// changed are channels that are closed when the object of that name changes.
	changed map[string]chan struct{}
}

// NewDispatcher returns a dispatcher that watches the objects of the client's driver from the first call of a method until ctx is done.
func NewDispatcher(ctx context.Context, client *Client) *Dispatcher {
	d := &Dispatcher{client: client, informer: client.informer(""), changed: map[string]chan struct{}{}}
	d.objects = cache.NewIntegerResourceVersionMutationCacheWithOptions(
		klog.FromContext(ctx), d.informer.GetStore(), cache.MutationCacheOptions{TTL: time.Minute, MaxCacheSize: 1000})
	d.begin = sync.OnceFunc(func() {
		d.begun.Store(true)
		notify := func(object any) {
			if node, ok := object.(*OverlayNode); ok {
				d.notify(node.Name)
			}
		}
		_, err := d.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: notify, UpdateFunc: func(_, object any) { notify(object) },
		})
		if err != nil {
			// Only an informer that has ended refuses a handler.
			klog.FromContext(ctx).Error(err, "Could not watch the OverlayNodes")
			return
		}
		go d.informer.RunWithContext(ctx)
	})
	return d
}

// Await waits until the dispatcher has seen the objects of all nodes. It returns ErrUnavailable if that takes longer than ctx.
func (d *Dispatcher) Await(ctx context.Context) error {
	d.begin()
	if !cache.WaitForCacheSync(ctx.Done(), d.informer.HasSynced) {
		return fmt.Errorf("%w: the OverlayNodes were not listed in time; see the controller's log", errdefs.ErrUnavailable)
	}
	return nil
}

// Get returns the object of a node, which the caller must not change. It returns ErrNotFound if there is none. It must be called after
// Await.
func (d *Dispatcher) Get(node string) (*OverlayNode, error) {
	name, err := d.client.Name(node)
	if err != nil {
		return nil, err
	}
	object, exists, err := d.objects.GetByKey(d.client.key(name))
	if err != nil {
		return nil, err
	}
	if !exists {
		return nil, fmt.Errorf("%w: OverlayNode %s: the driver has not run on node %s yet, or in another mode", errdefs.ErrNotFound, name, node)
	}
	return object.(*OverlayNode), nil
}

// All returns the objects of all nodes of the driver, which the caller must not change. It must be called after Await.
func (d *Dispatcher) All() []*OverlayNode {
	var nodes []*OverlayNode
	for _, object := range d.informer.GetStore().List() {
		if node := object.(*OverlayNode); strings.HasSuffix(node.Name, "."+d.client.driver) {
			nodes = append(nodes, node)
		}
	}
	return nodes
}

// Call hands a request about a volume to the driver of a node, and returns its answer. If that request was answered with OK before, Call
// returns that answer again. An earlier request about the volume with other content is replaced. Call returns ErrNotFound if the node has
// no object, and ErrUnavailable if the request is not answered before ctx is done: it stays, and another call waits for it again.
func (d *Dispatcher) Call(ctx context.Context, node, handle, method string, body []byte) (Result, error) {
	content, err := canonical(method, body)
	if err != nil {
		return Result{}, err
	}
	if err := d.Await(ctx); err != nil {
		return Result{}, err
	}
	name, err := d.client.Name(node)
	if err != nil {
		return Result{}, err
	}
	// posted is the ID of the request that this call has written or found, and seen is set once it was read.
	posted, seen := "", false
	for {
		changed := d.wait(name)
		object, err := d.Get(node)
		if err != nil {
			return Result{}, err
		}
		request, requested := object.Spec.Requests[handle]
		result, answered := object.answer(handle)
		isSame := requested && content.isIn(request.ID)
		switch {
		case posted != "" && request.ID == posted:
			seen = true
			if answered {
				return result, nil
			}
		case seen:
			return Result{}, fmt.Errorf("%w: another request about volume %s was given to node %s", errdefs.ErrAborted, handle, node)
		case posted != "":
			// What was read is older than the request.
		case isSame && !answered:
			posted, seen = request.ID, true
		case isSame && result.Code == 0:
			return result, nil
		default:
			posted = content.id(request.ID)
			if err := d.post(ctx, object, handle, Request{ID: posted, Method: method, Body: content.body, PostedAt: metav1.Now()}); err != nil {
				return Result{}, err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Result{}, fmt.Errorf("%w: node %s has not answered yet; is its driver running?", errdefs.ErrUnavailable, node)
		}
	}
}

// post writes a request, and removes answered ones that are too many.
func (d *Dispatcher) post(ctx context.Context, object *OverlayNode, handle string, request Request) error {
	var answered []string
	for other := range object.Spec.Requests {
		if _, ok := object.answer(other); ok && other != handle {
			answered = append(answered, other)
		}
	}
	if count := waiting(object); count >= maxWaiting {
		return fmt.Errorf("%w: node %s has %d requests to answer", errdefs.ErrUnavailable, object.Spec.Node, count)
	}
	requests := map[string]*Request{handle: &request}
	slices.SortFunc(answered, func(a, b string) int {
		return cmp.Or(object.Spec.Requests[b].PostedAt.Compare(object.Spec.Requests[a].PostedAt.Time), strings.Compare(a, b))
	})
	for _, old := range answered[min(len(answered), keepAnswered):] {
		requests[old] = nil
	}
	written, err := d.client.patch(ctx, object.Name, "", map[string]any{"spec": map[string]any{"requests": requests}})
	if err == nil {
		d.objects.Mutation(written)
	}
	return err
}

// waiting returns how many requests of a node have no answer.
func waiting(object *OverlayNode) int {
	count := 0
	for handle := range object.Spec.Requests {
		if _, answered := object.answer(handle); !answered {
			count++
		}
	}
	return count
}

// wait returns a channel that is closed when the object of that name changes.
func (d *Dispatcher) wait(name string) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.changed[name] == nil {
		d.changed[name] = make(chan struct{})
	}
	return d.changed[name]
}

func (d *Dispatcher) notify(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if changed := d.changed[name]; changed != nil {
		close(changed)
		delete(d.changed, name)
	}
}

// content is what a request asks for.
type content struct {
	body   json.RawMessage
	digest string
}

// canonical returns the content of a request. It is equal for bodies that are equal JSON.
func canonical(method string, body []byte) (content, error) {
	var parsed any
	if err := json.Unmarshal(body, &parsed); err != nil {
		return content{}, fmt.Errorf("%w: the body of %s is no JSON: %w", errdefs.ErrInvalidArgument, method, err)
	}
	sorted, err := json.Marshal(parsed)
	if err != nil {
		return content{}, err
	}
	if len(sorted) > maxBody {
		return content{}, fmt.Errorf("%w: the request has %d bytes, and the maximum for another node is %d",
			errdefs.ErrInvalidArgument, len(sorted), maxBody)
	}
	sum := sha256.Sum256(append([]byte(method+"\n"), sorted...))
	return content{body: sorted, digest: hex.EncodeToString(sum[:12])}, nil
}

// isIn reports whether the request with that ID has this content.
func (c content) isIn(id string) bool {
	digest, _, _ := strings.Cut(id, "-")
	return digest == c.digest
}

// id returns the ID of a request with this content that follows the one with ID last.
func (c content) id(last string) string {
	number := 0
	if c.isIn(last) {
		_, text, _ := strings.Cut(last, "-")
		// An ID that is no number's was not written by a dispatcher, and is followed by the first one.
		_, _ = fmt.Sscanf(text, "%d", &number)
	}
	return fmt.Sprintf("%s-%d", c.digest, number+1)
}
