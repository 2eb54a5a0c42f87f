package overlaynode

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
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
	// expireAfter is after how long a request is not carried out any more if nobody has repeated it. One that is repeated renewBefore that
	// is written again.
	expireAfter = 15 * time.Minute
	renewBefore = 5 * time.Minute
	// maxBody is the maximum size of a request's body in bytes.
	maxBody = 64 << 10
)

// ErrUnanswered is the error of a request that is in the node's object, and has no answer yet.
var ErrUnanswered = fmt.Errorf("%w: no answer yet", errdefs.ErrUnavailable)

// Dispatcher hands requests to the drivers of nodes. Several may do that at the same time.
type Dispatcher struct {
	client   *Client
	ctx      context.Context
	informer cache.SharedIndexInformer
	// objects are those of the informer, or what this dispatcher has written since.
	objects cache.MutationCache
	// begin has the informer run. A controller that is not the leader gets no requests, and watches nothing.
	begin func()
	begun atomic.Bool

	mu sync.Mutex
	// changed are channels that are closed when the object of that name changes.
	changed map[string]chan struct{}
	// outboxes have what is to be written into the object of that name.
	outboxes map[string]*outbox
}

// NewDispatcher returns a dispatcher that watches the objects of the client's driver from the first call of a method until ctx is done.
func NewDispatcher(ctx context.Context, client *Client) *Dispatcher {
	d := &Dispatcher{
		client: client, ctx: ctx, informer: client.informer(""), changed: map[string]chan struct{}{}, outboxes: map[string]*outbox{},
	}
	d.objects = cache.NewIntegerResourceVersionMutationCacheWithOptions(
		klog.FromContext(ctx), d.informer.GetStore(), cache.MutationCacheOptions{TTL: time.Minute, MaxCacheSize: 1000})
	d.begin = sync.OnceFunc(func() {
		d.begun.Store(true)
		notify := func(object any) {
			if name, err := cache.DeletionHandlingMetaNamespaceKeyFunc(object); err == nil {
				d.notify(strings.TrimPrefix(name, d.client.namespace+"/"))
			}
		}
		_, err := d.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: notify, UpdateFunc: func(_, object any) { notify(object) }, DeleteFunc: notify,
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
	return d.get(name)
}

func (d *Dispatcher) get(name string) (*OverlayNode, error) {
	object, exists, err := d.objects.GetByKey(d.client.key(name))
	if err != nil {
		return nil, err
	}
	if !exists {
		return nil, fmt.Errorf("%w: OverlayNode %s: the driver has not run on that node yet, or in another mode", errdefs.ErrNotFound, name)
	}
	return object.(*OverlayNode), nil
}

// All returns the objects of all nodes of the driver, which the caller must not change. It must be called after Await.
func (d *Dispatcher) All() []*OverlayNode {
	var nodes []*OverlayNode
	for _, object := range d.informer.GetStore().List() {
		node := object.(*OverlayNode)
		// Another driver may have its objects in the same namespace.
		if name, err := d.client.Name(node.Spec.Node); err == nil && name == node.Name {
			nodes = append(nodes, node)
		}
	}
	return nodes
}

// Call hands a request about a volume to the driver of a node, and returns its answer. It joins the same request of another call that has
// no answer yet. An earlier request about the volume with other content is replaced. Call returns ErrNotFound if the node has no object,
// and ErrUnanswered if the request is not answered before ctx is done: it stays for a while, and another call waits for it again. Any
// other error but ErrAborted means that the request was not given to the node.
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
	release := d.hold(name, handle)
	defer release()
	// posted is the ID of the request that this call has written or joined, and replaced that of the one in whose place it was written.
	posted, replaced := "", ""
	for {
		changed := d.wait(name)
		object, err := d.get(name)
		if posted != "" && errdefs.IsNotFound(err) {
			return Result{}, fmt.Errorf("%w: the OverlayNode of node %s was deleted", errdefs.ErrUnavailable, node)
		}
		if err != nil {
			return Result{}, err
		}
		request, requested := object.Spec.Requests[handle]
		result, answered := object.Answer(handle)
		isSame := requested && content.isIn(request.ID)
		switch {
		case posted != "" && request.ID == replaced:
			// What was read is older than the request, and its answer too.
		case posted != "" && isSame && answered:
			// It may be that of another controller.
			return result, nil
		case posted != "" && isSame:
		case posted != "":
			return Result{}, fmt.Errorf("%w: another request about volume %s was given to node %s", errdefs.ErrAborted, handle, node)
		case isSame && !answered && !expiresSoon(request):
			posted, replaced = request.ID, noRequest
		default:
			posted, replaced = content.newID(), request.ID
			if err := d.post(ctx, name, handle, newRequest(posted, method, content)); err != nil {
				return Result{}, err
			}
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Result{}, fmt.Errorf("%w: node %s; is its driver running?", ErrUnanswered, node)
		}
	}
}

// noRequest is the ID of no request, also not of one that is missing.
const noRequest = "none"

func newRequest(id, method string, content content) Request {
	now := time.Now()
	return Request{
		ID: id, Method: method, Body: content.body, PostedAt: metav1.NewTime(now), ExpiresAt: &metav1.Time{Time: now.Add(expireAfter)},
	}
}

func expiresSoon(request Request) bool {
	return request.ExpiresAt != nil && time.Until(request.ExpiresAt.Time) < renewBefore
}

// Keep has the unanswered request about a volume carried out whenever the node comes back, also if nobody repeats it. It returns an error
// if there is no such request.
func (d *Dispatcher) Keep(ctx context.Context, node, handle string) error {
	object, err := d.Get(node)
	if err != nil {
		return err
	}
	request, requested := object.Spec.Requests[handle]
	switch {
	case !requested:
		return fmt.Errorf("%w: node %s has no request about volume %s", errdefs.ErrUnavailable, node, handle)
	case request.ExpiresAt == nil:
		return nil
	}
	written, err := d.client.patch(ctx, object.Name, "", map[string]any{"spec": map[string]any{"requests": map[string]any{
		handle: map[string]any{"expiresAt": nil},
	}}})
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	if err == nil {
		d.objects.Mutation(written)
	}
	return err
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
type content struct{ body, digest string }

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
	return content{body: string(sorted), digest: hex.EncodeToString(sum[:12])}, nil
}

// isIn reports whether the request with that ID has this content.
func (c content) isIn(id string) bool {
	digest, _, _ := strings.Cut(id, "-")
	return digest == c.digest
}

// newID returns an ID that no other request has: an old answer must not be taken for one to a new request.
func (c content) newID() string { return c.digest + "-" + rand.Text()[:12] }
