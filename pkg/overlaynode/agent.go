package overlaynode

import (
	"context"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// Keys of log messages.
const (
	keyName     = "overlayNode"
	keyRequests = "requests"
)

const (
	// maxConcurrent is how many requests a node carries out at a time.
	maxConcurrent = 8
	// requestTimeout is how long a node tries to carry out a request. The next try goes on where it can.
	requestTimeout = 2 * time.Minute
	// writeTimeout is how long a write to the API server may take.
	writeTimeout = 15 * time.Second
	// measureTimeout is how long to measure the capacity may take.
	measureTimeout = 5 * time.Second
	// maxMessage is the maximum length of a result's message in bytes, and maxMessageIfMany that where all results take more than
	// manyResults bytes: an object of the API server has at most 1.5 MiB. What has a larger body than maxBodyIfMany is to be asked for again
	// then.
	maxMessage       = 1024
	maxMessageIfMany = 128
	manyResults      = 256 << 10
	maxBodyIfMany    = 1024
	// unavailable is gRPC's code.
	unavailable = 14
)

// Handler carries out a request. It is called again with a request that it has carried out before, after a crash.
type Handler func(ctx context.Context, method string, body []byte) Result

// AgentConfig is what an [Agent] consists of.
type AgentConfig struct {
	Client *Client
	// Node is the name of the node.
	Node string
	// Handle carries out requests.
	Handle Handler
	// Capacity returns how many bytes the node can reserve.
	Capacity func(context.Context) (int64, error)
	// PublicKey is the public part of the key for secrets in requests.
	PublicKey string
	// ReportInterval is the time between two looks at the capacity. It is written if it changed, and at each tenth look.
	ReportInterval time.Duration
}

// Agent carries out the requests in the OverlayNode of one node, and writes the results and the node's capacity into it.
type Agent struct {
	AgentConfig
	name string
	// slots bounds how many requests are carried out at a time.
	slots *semaphore.Weighted

	mu sync.Mutex
	// running are the IDs of the requests that are being carried out, by volume handle.
	running map[string]string
	// done are the results that the object does not have yet, as far as is known.
	done map[string]Result
	work sync.WaitGroup
	// wake is sent to when there is something to write.
	wake chan struct{}
}

// NewAgent returns an agent, which does nothing before Run. It returns ErrInvalidArgument if the node's object cannot have its name.
func NewAgent(config AgentConfig) (*Agent, error) {
	name, err := config.Client.Name(config.Node)
	if err != nil {
		return nil, err
	}
	return &Agent{
		AgentConfig: config, name: name, slots: semaphore.NewWeighted(maxConcurrent),
		running: map[string]string{}, done: map[string]Result{}, wake: make(chan struct{}, 1),
	}, nil
}

// Run carries out requests until ctx is done, and those that have begun end then. It makes the node's object if there is none, also
// later.
func (a *Agent) Run(ctx context.Context) {
	defer a.work.Wait()
	if err := a.Client.ensure(ctx, a.Node); err != nil {
		// It is tried again when the informer has listed, which it cannot where there is no such kind.
		klog.FromContext(ctx).Error(err, "Could not make the OverlayNode", keyName, a.name)
	}
	informer := a.Client.informer(a.name)
	changed := func(any) { a.start(ctx, informer); a.notify() }
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    changed,
		UpdateFunc: func(_, object any) { changed(object) },
		DeleteFunc: func(any) { a.notify() },
	})
	if err != nil {
		// Only an informer that has ended refuses a handler.
		klog.FromContext(ctx).Error(err, "Could not watch the OverlayNode", keyName, a.name)
		return
	}
	a.work.Go(func() { informer.RunWithContext(ctx) })
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return
	}
	a.write(ctx, informer)
}

// current returns the object as the API server last sent it, nil if there is none.
func (a *Agent) current(informer cache.SharedIndexInformer) *OverlayNode {
	object, exists, err := informer.GetStore().GetByKey(a.Client.key(a.name))
	if err != nil || !exists {
		return nil
	}
	return object.(*OverlayNode)
}

// notify has the object written soon.
func (a *Agent) notify() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// start begins to carry out the requests that have no result. One of a volume whose earlier request is under way begins after that.
func (a *Agent) start(ctx context.Context, informer cache.SharedIndexInformer) {
	object := a.current(informer)
	if object == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	// Not when they are written: what the informer has may be older than that.
	maps.DeleteFunc(a.done, func(handle string, result Result) bool {
		return object.Status.Results[handle].ID == result.ID || object.Spec.Requests[handle].ID != result.ID
	})
	for handle, request := range object.Spec.Requests {
		if _, answered := object.Answer(handle); answered || a.done[handle].ID == request.ID || a.running[handle] != "" ||
			request.IsExpired() {
			continue
		}
		a.running[handle] = request.ID
		a.work.Go(func() { a.carryOut(ctx, informer, handle, request) })
	}
}

func (a *Agent) carryOut(ctx context.Context, informer cache.SharedIndexInformer, handle string, request Request) {
	if a.slots.Acquire(ctx, 1) != nil {
		return
	}
	if !a.isWanted(informer, handle, request.ID) {
		a.slots.Release(1)
		a.mu.Lock()
		delete(a.running, handle)
		a.mu.Unlock()
		a.start(ctx, informer)
		return
	}
	limited, cancel := context.WithTimeout(ctx, requestTimeout)
	result := a.Handle(limited, request.Method, []byte(request.Body))
	cancel()
	a.slots.Release(1)
	if ctx.Err() != nil {
		// The error is that the driver ends. The next one carries out the request.
		return
	}
	result.ID = request.ID
	result.Message = cut(result.Message, maxMessage)
	a.mu.Lock()
	delete(a.running, handle)
	a.done[handle] = result
	a.mu.Unlock()
	a.notify()
	// There may be another request for the volume.
	a.start(ctx, informer)
}

// isWanted reports whether the object still has a request, which may have waited long for its turn. What nobody waits for any more must not
// make a volume that nobody knows.
func (a *Agent) isWanted(informer cache.SharedIndexInformer, handle, id string) bool {
	object := a.current(informer)
	if object == nil {
		return false
	}
	request := object.Spec.Requests[handle]
	return request.ID == id && !request.IsExpired()
}

// write writes what is new until ctx is done.
func (a *Agent) write(ctx context.Context, informer cache.SharedIndexInformer) {
	report := time.NewTimer(0)
	defer report.Stop()
	looks := 0
	newBackoff := func() *wait.Backoff {
		return &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 0.5, Steps: 9, Cap: time.Minute}
	}
	backoff := newBackoff()
	for {
		look, full := false, false
		select {
		case <-ctx.Done():
			return
		case <-report.C:
			look, full = true, looks%10 == 0
			looks++
			// Nodes that started together do not report together for ever.
			report.Reset(a.ReportInterval/2 + rand.N(a.ReportInterval))
		case <-a.wake:
		}
		if err := a.writeOnce(ctx, informer, look, full); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Could not write the OverlayNode", keyName, a.name)
			time.AfterFunc(backoff.Step(), a.notify)
			if full {
				looks = 0
			}
			continue
		}
		backoff = newBackoff()
	}
}

// writeOnce makes the object if there is none, and writes the results that it does not have. The capacity it writes with these. With look
// set, it also writes it if it has changed by a hundredth, and with full set in any case.
func (a *Agent) writeOnce(ctx context.Context, informer cache.SharedIndexInformer, look, full bool) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	object := a.current(informer)
	if object == nil {
		// When it is there, the informer says so.
		return a.Client.ensure(ctx, a.Node)
	}
	results, answers := a.newResults(object)
	isNew := object.Status.ReportedAt.IsZero()
	// What nobody asks for any more is removed with the next answer.
	if answers == 0 && !look && !isNew {
		return nil
	}
	status := map[string]any{"reportedAt": metav1.Now(), "publicKey": a.PublicKey}
	capacity, err := a.measure(ctx)
	last := object.Status.CapacityBytes
	switch {
	case err != nil:
		klog.FromContext(ctx).Error(err, "Could not measure the capacity", keyName, a.name)
	case len(results) == 0 && !full && !isNew && abs(capacity-last) <= last/100:
		return nil
	default:
		status["capacityBytes"] = capacity
	}
	if len(results) > 0 {
		status["results"] = results
	}
	_, err = a.Client.patch(ctx, a.name, "status", map[string]any{"status": status})
	return err
}

// measure returns the capacity. Answers do not wait long for it.
func (a *Agent) measure(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, measureTimeout)
	defer cancel()
	return a.Capacity(ctx)
}

// newResults returns what to change in the results of the object: those that it lacks, which are the answers, and nil for those that nobody
// asks for any more.
func (a *Agent) newResults(object *OverlayNode) (results map[string]*Result, answers int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	results = map[string]*Result{}
	size := 0
	for handle, result := range object.Status.Results {
		if _, asked := object.Spec.Requests[handle]; !asked {
			results[handle] = nil
			continue
		}
		size += result.size()
	}
	for handle, result := range a.done {
		if object.Status.Results[handle].ID != result.ID {
			if size+result.size() > manyResults && len(result.Body) > maxBodyIfMany {
				result = Result{ID: result.ID, Code: unavailable, Message: "the answers of this node take too much space at the moment; ask again"}
			}
			if size += result.size(); size > manyResults {
				result.Message = cut(result.Message, maxMessageIfMany)
			}
			results[handle] = &result
			answers++
		}
	}
	return results, answers
}

// cut returns the beginning of a text, at most limit bytes of it.
func cut(text string, limit int) string { return strings.ToValidUTF8(text[:min(len(text), limit)], "") }

func abs(n int64) int64 { return max(n, -n) }
