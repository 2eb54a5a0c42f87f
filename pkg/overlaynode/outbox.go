package overlaynode

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// keepAnswered is how long an answered request stays, so that a controller that takes over finds what the one before has begun, and
	// keepExpired how long one that expired without an answer. keepBytes is how many bytes each of these may take, with the answers.
	keepAnswered = 15 * time.Minute
	keepExpired  = time.Hour
	keepBytes    = 64 << 10
	// maxRequests is the maximum size of all requests of a node in bytes. An object of the API server has at most 1.5 MiB, and the answers
	// take their part. Requests that are larger than small may take maxLarge of it: many deletions do not wait for a few creations.
	maxRequests = 512 << 10
	maxLarge    = 256 << 10
	small       = 1 << 10
)

// outbox collects the requests for one node while an earlier write into its object is under way: the API server takes few writes of one
// object a second.
type outbox struct {
	queued  map[string]*queued
	writing bool
	// calls counts the calls that wait for an answer, by volume handle.
	calls map[string]int
}

type queued struct {
	request Request
	done    chan struct{}
	// err may be read after done is closed.
	err error
}

// outbox returns that of the object of a name. The caller holds the lock.
func (d *Dispatcher) outbox(name string) *outbox {
	if d.outboxes[name] == nil {
		d.outboxes[name] = &outbox{queued: map[string]*queued{}, calls: map[string]int{}}
	}
	return d.outboxes[name]
}

// hold keeps the request about a volume in the object until release is called.
func (d *Dispatcher) hold(name, handle string) (release func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	calls := d.outbox(name).calls
	calls[handle]++
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if calls[handle]--; calls[handle] == 0 {
			delete(calls, handle)
		}
	}
}

// post has a request written, and waits for that. If it returns an error, the request may be written nevertheless.
func (d *Dispatcher) post(ctx context.Context, name, handle string, request Request) error {
	d.mu.Lock()
	box := d.outbox(name)
	if other := box.queued[handle]; other != nil {
		other.err = fmt.Errorf("%w: another request about volume %s was given to the node", errdefs.ErrAborted, handle)
		close(other.done)
	}
	mine := &queued{request: request, done: make(chan struct{})}
	box.queued[handle] = mine
	if !box.writing {
		box.writing = true
		go d.write(name, box)
	}
	d.mu.Unlock()
	select {
	case <-mine.done:
		return mine.err
	case <-ctx.Done():
		return fmt.Errorf("%w: the request for %s was not written in time", errdefs.ErrUnavailable, name)
	}
}

// write writes what is queued until nothing is.
func (d *Dispatcher) write(name string, box *outbox) {
	for {
		d.mu.Lock()
		batch := box.queued
		box.queued = map[string]*queued{}
		if len(batch) == 0 {
			box.writing = false
			d.mu.Unlock()
			return
		}
		calls := maps.Clone(box.calls)
		d.mu.Unlock()
		err := d.writeBatch(name, batch, calls)
		for _, entry := range batch {
			entry.err = cmp.Or(entry.err, err)
			close(entry.done)
		}
	}
}

// writeBatch writes the requests that there is room for, and removes what is not needed any more. The entries that there is no room for get
// an error.
func (d *Dispatcher) writeBatch(name string, batch map[string]*queued, calls map[string]int) error {
	ctx, cancel := context.WithTimeout(d.ctx, writeTimeout)
	defer cancel()
	object, err := d.get(name)
	if err != nil {
		return err
	}
	requests := map[string]*Request{}
	total, large := 0, 0
	count := func(request Request) {
		total += request.size()
		if len(request.Body) > small {
			large += request.size()
		}
	}
	needless := needless(object, calls)
	for handle, request := range object.Spec.Requests {
		switch {
		case batch[handle] != nil:
		case slices.Contains(needless, handle):
			requests[handle] = nil
		default:
			count(request)
		}
	}
	for handle, entry := range batch {
		size, isLarge := entry.request.size(), len(entry.request.Body) > small
		if total+size > maxRequests || isLarge && large+size > maxLarge {
			entry.err = fmt.Errorf("%w: node %s has %d KiB of requests to answer", errdefs.ErrUnavailable, object.Spec.Node, total>>10)
			continue
		}
		count(entry.request)
		requests[handle] = &entry.request
	}
	if len(requests) == 0 {
		return nil
	}
	written, err := d.client.patch(ctx, name, "", map[string]any{"spec": map[string]any{"requests": requests}})
	if err == nil {
		d.objects.Mutation(written)
	}
	return err
}

// needless returns the handles of the requests that need not stay: of those that expired, which a controller that was away looks for, and
// of the answered ones that no call waits for, all but the newest.
func needless(object *OverlayNode, calls map[string]int) []string {
	var expired, answered []string
	for handle, request := range object.Spec.Requests {
		switch _, ok := object.Answer(handle); {
		case calls[handle] > 0:
		case ok:
			answered = append(answered, handle)
		case request.IsExpired():
			expired = append(expired, handle)
		}
	}
	return append(beyond(object, expired, keepExpired), beyond(object, answered, keepAnswered)...)
}

// beyond returns the handles of requests that are older than keep, and of the oldest where all take more than keepBytes.
func beyond(object *OverlayNode, handles []string, keep time.Duration) []string {
	posted := func(handle string) time.Time { return object.Spec.Requests[handle].PostedAt.Time }
	slices.SortFunc(handles, func(a, b string) int { return cmp.Or(posted(b).Compare(posted(a)), strings.Compare(a, b)) })
	size := 0
	for i, handle := range handles {
		size += object.Spec.Requests[handle].size() + len(object.Status.Results[handle].Body)
		if size > keepBytes || time.Since(posted(handle)) > keep {
			return handles[i:]
		}
	}
	return nil
}
