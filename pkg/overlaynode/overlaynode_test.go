package overlaynode

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// runAgent runs an agent of a node until stop is called or the test ends.
func runAgent(t *testing.T, s *apiServer, node string, handle Handler) (stop func()) {
	t.Helper()
	agent, err := NewAgent(AgentConfig{
		Client: s.client(), Node: node, Handle: handle, ReportInterval: time.Hour,
		Capacity: func(context.Context) (int64, error) { return 1 << 30, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { agent.Run(ctx); close(done) }()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(stop)
	return stop
}

// newDispatcher returns a dispatcher that has seen the objects of the nodes.
func newDispatcher(t *testing.T, s *apiServer, nodes ...string) *Dispatcher {
	t.Helper()
	d := NewDispatcher(t.Context(), s.client())
	if err := d.Await(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, node := range nodes {
		eventually(t, "the dispatcher sees the object of "+node, func() bool { _, err := d.Get(node); return err == nil })
	}
	return d
}

// patience bounds what hangs. It is long: a machine with much other work may be slow.
const patience = 2 * time.Minute

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

// call calls a node, and waits with patience.
func call(t *testing.T, d *Dispatcher, node, handle, method, body string) (Result, error) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return d.Call(ctx, node, handle, method, []byte(body))
}

// echo answers with the method and the body of the request.
func echo(_ context.Context, method string, body []byte) Result {
	answer, err := json.Marshal(map[string]string{"method": method, "body": string(body)})
	if err != nil {
		return Result{Code: 13, Message: err.Error()}
	}
	return Result{Body: string(answer)}
}

func TestCall(t *testing.T) {
	s := newAPIServer(t)
	var calls atomic.Int32
	runAgent(t, s, "a", func(ctx context.Context, method string, body []byte) Result {
		calls.Add(1)
		return echo(ctx, method, body)
	})
	runAgent(t, s, "b", func(context.Context, string, []byte) Result { return Result{Code: 8, Message: "no room"} })
	d := newDispatcher(t, s, "a", "b")
	want := `{"body":"{\"size\":1}","method":"Create"}`
	for _, body := range []string{`{"size":1}`, `{ "size" : 1 }`} {
		result, err := call(t, d, "a", "v", "Create", body)
		if err != nil || result.Code != 0 || result.Body != want {
			t.Errorf("got %+v, %v; want %s", result, err, want)
		}
	}
	if calls.Load() != 2 {
		t.Errorf("an answered request that is made again was carried out %d times, not twice", calls.Load())
	}
	if result, err := call(t, d, "a", "v", "Delete", `{}`); err != nil || !strings.Contains(result.Body, "Delete") {
		t.Errorf("another request about the volume: %+v, %v", result, err)
	}
	ids := map[string]bool{}
	for try := range 2 {
		result, err := call(t, d, "b", "v", "Create", `{}`)
		if err != nil || result.Code != 8 || result.Message != "no room" || ids[result.ID] {
			t.Errorf("try %d of what fails: %+v, %v", try, result, err)
		}
		ids[result.ID] = true
	}
	if _, err := call(t, d, "gone", "v", "Create", `{}`); !errdefs.IsNotFound(err) {
		t.Errorf("a node without an object: %v", err)
	}
	if _, err := call(t, d, "a", "v", "Create", strings.Repeat(" ", 10)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a body that is no JSON: %v", err)
	}
	if _, err := call(t, d, "a", "v", "Create", `"`+strings.Repeat("x", maxBody)+`"`); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a large body: %v", err)
	}
}

// TestOldAnswer: where a watch is late, and what was written is not remembered either, the answer to an earlier request is not taken for
// one to a new request of the same content.
func TestOldAnswer(t *testing.T) {
	s := newAPIServer(t)
	var calls atomic.Int32
	runAgent(t, s, "a", func(context.Context, string, []byte) Result { return Result{Message: fmt.Sprint(calls.Add(1))} })
	d := newDispatcher(t, s, "a")
	d.objects = cache.NewIntegerResourceVersionMutationCacheWithOptions(
		klog.Background(), d.informer.GetStore(), cache.MutationCacheOptions{TTL: time.Nanosecond})
	for want := range 3 {
		result, err := call(t, d, "a", "v", "Delete", `{}`)
		if err != nil || result.Message != fmt.Sprint(want+1) {
			t.Errorf("got %+v, %v; want answer %d", result, err, want+1)
		}
		s.mu.Lock()
		s.lag = 200 * time.Millisecond
		s.mu.Unlock()
	}
}

// TestAnswerToALaterCall: a request whose caller has gone is carried out, and the next caller, of another controller, gets the answer.
func TestAnswerToALaterCall(t *testing.T) {
	s := newAPIServer(t)
	release, calls := make(chan struct{}), atomic.Int32{}
	runAgent(t, s, "a", func(ctx context.Context, method string, body []byte) Result {
		calls.Add(1)
		select {
		case <-release:
		case <-ctx.Done():
		}
		return echo(ctx, method, body)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := newDispatcher(t, s, "a").Call(ctx, "a", "v", "Create", []byte(`{}`)); !errors.Is(err, ErrUnanswered) {
		t.Fatalf("got %v; want that node a has not answered", err)
	}
	second := newDispatcher(t, s, "a")
	time.AfterFunc(100*time.Millisecond, func() { close(release) })
	if result, err := call(t, second, "a", "v", "Create", `{}`); err != nil || result.Code != 0 {
		t.Errorf("got %+v, %v", result, err)
	}
	if calls.Load() != 1 {
		t.Errorf("carried out %d times", calls.Load())
	}
}

// TestTwoControllers: controllers that give the same request to a node at the same time get the same answer, and the node writes one.
func TestTwoControllers(t *testing.T) {
	s := newAPIServer(t)
	var calls atomic.Int32
	runAgent(t, s, "a", func(ctx context.Context, method string, body []byte) Result {
		calls.Add(1)
		time.Sleep(50 * time.Millisecond)
		return echo(ctx, method, body)
	})
	dispatchers := []*Dispatcher{newDispatcher(t, s, "a"), newDispatcher(t, s, "a")}
	var work sync.WaitGroup
	for i := range 10 {
		for _, d := range dispatchers {
			work.Go(func() {
				result, err := call(t, d, "a", fmt.Sprintf("v%d", i), "Create", `{}`)
				if err != nil || result.Code != 0 {
					t.Errorf("got %+v, %v", result, err)
				}
			})
		}
	}
	work.Wait()
	if n := calls.Load(); n < 10 || n > 20 {
		t.Errorf("10 requests by two controllers were carried out %d times", n)
	}
}

// TestAgentIsKilled: what a driver had not answered is carried out by the next one, and what it had answered is not.
func TestAgentIsKilled(t *testing.T) {
	s := newAPIServer(t)
	began := make(chan struct{}, 1)
	stop := runAgent(t, s, "a", func(ctx context.Context, method string, body []byte) Result {
		if method == "Hang" {
			began <- struct{}{}
			<-ctx.Done()
		}
		return echo(ctx, method, body)
	})
	d := newDispatcher(t, s, "a")
	if _, err := call(t, d, "a", "done", "Create", `{}`); err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		if result, err := call(t, d, "a", "cut", "Hang", `{}`); err != nil || result.Body != `"second"` {
			t.Errorf("got %+v, %v", result, err)
		}
	})
	<-began
	stop()
	if _, answered := s.get("a").Answer("cut"); answered {
		t.Error("a driver that ended wrote an answer to what it had not carried out")
	}
	runAgent(t, s, "a", func(_ context.Context, method string, _ []byte) Result {
		if method != "Hang" {
			t.Errorf("%s was carried out again", method)
		}
		return Result{Body: `"second"`}
	})
	work.Wait()
}

// TestAPIServerRefusesWrites: answers are written when the API server takes writes again.
func TestAPIServerRefusesWrites(t *testing.T) {
	s := newAPIServer(t)
	carriedOut := make(chan struct{}, 1)
	runAgent(t, s, "a", func(ctx context.Context, method string, body []byte) Result {
		s.setRefuse(true)
		carriedOut <- struct{}{}
		return echo(ctx, method, body)
	})
	d := newDispatcher(t, s, "a")
	time.AfterFunc(time.Second, func() { <-carriedOut; s.setRefuse(false) })
	if result, err := call(t, d, "a", "v", "Create", `{}`); err != nil || result.Code != 0 {
		t.Errorf("got %+v, %v", result, err)
	}
}

// TestObjectIsRemoved: the agent makes its object again, and a caller learns that its request is gone.
func TestObjectIsRemoved(t *testing.T) {
	s := newAPIServer(t)
	runAgent(t, s, "a", echo)
	d := newDispatcher(t, s, "a")
	eventually(t, "it is removed", func() bool { return s.client().remove(t.Context(), s.get("a")) == nil })
	eventually(t, "there is another object", func() bool { o := s.get("a"); return o != nil && !o.Status.ReportedAt.IsZero() })
	eventually(t, "it takes requests", func() bool {
		result, err := call(t, d, "a", "v", "Create", `{}`)
		return err == nil && result.Code == 0
	})
}

// TestWritesAreBatched: many calls at once take few writes of the node's object, on both sides.
func TestWritesAreBatched(t *testing.T) {
	s := newAPIServer(t)
	runAgent(t, s, "a", echo)
	d := newDispatcher(t, s, "a")
	const calls = 200
	var work sync.WaitGroup
	for i := range calls {
		work.Go(func() {
			if result, err := call(t, d, "a", fmt.Sprint("v", i), "Create", `{}`); err != nil || result.Code != 0 {
				t.Errorf("got %+v, %v", result, err)
			}
		})
	}
	work.Wait()
	if requests, results := s.count("PATCH"), s.count("PATCHstatus"); requests > calls/2 || results > calls/2 {
		t.Errorf("%d calls took %d writes of requests and %d of results", calls, requests, results)
	}
}

// TestAnswersTakeOneWrite: what is to be removed from the object is removed with the next answer.
func TestAnswersTakeOneWrite(t *testing.T) {
	s := newAPIServer(t)
	runAgent(t, s, "a", func(context.Context, string, []byte) Result {
		time.Sleep(10 * time.Millisecond)
		return Result{Body: `{}`}
	})
	d := newDispatcher(t, s, "a")
	const requests = 40
	body := fmt.Sprintf(`{"text":%q}`, strings.Repeat("x", keepBytes/10))
	for i := range requests {
		if _, err := call(t, d, "a", fmt.Sprintf("v%02d", i), "Create", body); err != nil {
			t.Fatal(err)
		}
	}
	// Another one is the first report.
	if writes := s.count("PATCHstatus"); writes > requests*11/10 {
		t.Errorf("%d answers took %d writes", requests, writes)
	}
}

// TestAnsweredRequestsAreRemoved: the object does not grow with the number of requests.
func TestAnsweredRequestsAreRemoved(t *testing.T) {
	s := newAPIServer(t)
	runAgent(t, s, "a", echo)
	d := newDispatcher(t, s, "a")
	body := fmt.Sprintf(`{"text":%q}`, strings.Repeat("x", keepBytes/10))
	for i := range 20 {
		if _, err := call(t, d, "a", fmt.Sprintf("v%02d", i), "Create", body); err != nil {
			t.Fatal(err)
		}
	}
	object := s.get("a")
	if n := len(object.Spec.Requests); n < 5 || n > 12 {
		t.Errorf("%d requests are left", n)
	}
	if _, ok := object.Spec.Requests["v19"]; !ok {
		t.Error("the newest request is not left")
	}
	if n := len(object.Status.Results); n > 15 {
		t.Errorf("%d results are left", n)
	}
}

// TestRequestsAreBounded: what tenants ask of a node that does not answer does not fill its object, and leaves room for deletions.
func TestRequestsAreBounded(t *testing.T) {
	s := newAPIServer(t)
	if err := s.client().ensure(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	d := newDispatcher(t, s, "a")
	post := func(handle string, size int) error {
		return d.post(t.Context(), "a."+testDriver, handle, Request{ID: "x-" + handle, Body: strings.Repeat("x", size), PostedAt: metav1.Now()})
	}
	refused := 0
	for i := range 20 {
		if err := post(fmt.Sprint("large", i), maxBody); errdefs.IsUnavailable(err) {
			refused++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if refused != 17 {
		t.Errorf("%d of 20 large requests were refused", refused)
	}
	var work sync.WaitGroup
	for i := range 500 {
		work.Go(func() {
			if err := post(fmt.Sprint("small", i), 100); err != nil {
				t.Errorf("small request %d: %v", i, err)
			}
		})
	}
	work.Wait()
	if encoded, err := json.Marshal(s.get("a")); err != nil || len(encoded) > 700<<10 {
		t.Errorf("the object has %d bytes, %v", len(encoded), err)
	}
}

// TestRequestsExpire: what nobody repeats is not carried out, unless it is kept.
func TestRequestsExpire(t *testing.T) {
	s := newAPIServer(t)
	if err := s.client().ensure(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	d := newDispatcher(t, s, "a")
	for _, handle := range []string{"forgotten", "kept"} {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		_, err := d.Call(ctx, "a", handle, "Delete", []byte(`{}`))
		cancel()
		if !errors.Is(err, ErrUnanswered) {
			t.Fatal(err)
		}
	}
	if err := d.Keep(t.Context(), "a", "kept"); err != nil {
		t.Fatal(err)
	}
	if err := d.Keep(t.Context(), "a", "other"); !errdefs.IsUnavailable(err) {
		t.Errorf("keep a request that is not there: %v", err)
	}
	s.mu.Lock()
	object := s.objects["a."+testDriver].DeepCopyObject().(*OverlayNode)
	forgotten := object.Spec.Requests["forgotten"]
	forgotten.ExpiresAt = &metav1.Time{Time: time.Now().Add(-time.Second)}
	object.Spec.Requests["forgotten"] = forgotten
	s.store(io.Discard, "MODIFIED", object)
	s.mu.Unlock()
	carriedOut := make(chan string, 10)
	runAgent(t, s, "a", func(_ context.Context, _ string, body []byte) Result {
		carriedOut <- string(body)
		return Result{}
	})
	eventually(t, "the kept request is answered", func() bool { _, ok := s.get("a").Answer("kept"); return ok })
	if _, ok := s.get("a").Answer("forgotten"); ok || len(carriedOut) != 1 {
		t.Errorf("%d requests were carried out, the forgotten one: %v", len(carriedOut), ok)
	}
	if result, err := call(t, d, "a", "forgotten", "Delete", `{}`); err != nil || result.Code != 0 {
		t.Errorf("a request that is repeated after all: %+v, %v", result, err)
	}
}

// TestExpiredRequestsStay: a controller that was away finds what it had begun, and the object does not grow with what is forgotten.
func TestExpiredRequestsStay(t *testing.T) {
	object := &OverlayNode{Spec: Spec{Requests: map[string]Request{}}}
	post := func(handle string, ago time.Duration, body string) {
		posted := time.Now().Add(-ago)
		object.Spec.Requests[handle] = Request{
			ID: handle, Body: body, PostedAt: metav1.NewTime(posted), ExpiresAt: &metav1.Time{Time: posted.Add(expireAfter)},
		}
	}
	post("wanted", time.Minute, "{}")
	post("forgotten", expireAfter+time.Minute, "{}")
	post("forgotten long ago", keepExpired+time.Minute, "{}")
	if got := needless(object, nil); !slices.Equal(got, []string{"forgotten long ago"}) {
		t.Errorf("needless: %q", got)
	}
	const many = 200
	for i := range many {
		post(fmt.Sprint("many-", i), expireAfter+2*time.Minute, strings.Repeat("x", small))
	}
	got := needless(object, nil)
	if left := many + 2 - len(got); left*small > keepBytes || left < keepBytes/small/2 || slices.Contains(got, "forgotten") {
		t.Errorf("%d expired requests stay", left)
	}
}

// TestRequestsThatWaitExpire: what expired or was replaced while it waited for its turn is not carried out.
func TestRequestsThatWaitExpire(t *testing.T) {
	s := newAPIServer(t)
	release, mu, carriedOut := make(chan struct{}), sync.Mutex{}, map[string]bool{}
	agent, err := NewAgent(AgentConfig{
		Client: s.client(), Node: "a", ReportInterval: time.Hour, Capacity: func(context.Context) (int64, error) { return 1, nil },
		Handle: func(_ context.Context, method string, _ []byte) Result {
			<-release
			mu.Lock()
			defer mu.Unlock()
			carriedOut[method] = true
			return Result{}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { agent.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	d := newDispatcher(t, s, "a")
	var work sync.WaitGroup
	post := func(handle, method string) {
		work.Go(func() {
			if _, err := call(t, d, "a", handle, method, `{}`); err != nil && !errdefs.IsAborted(err) {
				t.Errorf("%s: %v", method, err)
			}
		})
		eventually(t, handle+" is in the object", func() bool { return s.get("a").Spec.Requests[handle].Method == method })
		eventually(t, "the agent has begun with "+handle, func() bool {
			agent.mu.Lock()
			defer agent.mu.Unlock()
			return agent.running[handle] != ""
		})
	}
	for i := range maxConcurrent {
		post(fmt.Sprint("hangs-", i), "Hang")
	}
	eventually(t, "all slots are taken", func() bool {
		if agent.slots.TryAcquire(1) {
			agent.slots.Release(1)
			return false
		}
		return true
	})
	post("replaced", "Early")
	post("replaced", "Late")
	s.mu.Lock()
	object := s.objects["a."+testDriver].DeepCopyObject().(*OverlayNode)
	now := time.Now()
	object.Spec.Requests["forgotten"] = Request{
		ID: "x", Method: "Forgotten", Body: "{}", PostedAt: metav1.NewTime(now), ExpiresAt: &metav1.Time{Time: now.Add(2 * time.Second)},
	}
	s.store(io.Discard, "MODIFIED", object)
	s.mu.Unlock()
	eventually(t, "it expired", object.Spec.Requests["forgotten"].IsExpired)
	close(release)
	work.Wait()
	eventually(t, "the agent does nothing any more", func() bool {
		agent.mu.Lock()
		defer agent.mu.Unlock()
		return len(agent.running) == 0
	})
	mu.Lock()
	defer mu.Unlock()
	if !carriedOut["Hang"] || !carriedOut["Late"] || carriedOut["Early"] || carriedOut["Forgotten"] {
		t.Errorf("carried out: %v", carriedOut)
	}
}

func TestLongMessageIsCut(t *testing.T) {
	s := newAPIServer(t)
	runAgent(t, s, "a", func(context.Context, string, []byte) Result {
		return Result{Code: 2, Message: strings.Repeat("ü", maxMessage)}
	})
	result, err := call(t, newDispatcher(t, s, "a"), "a", "v", "Create", `{}`)
	if err != nil || len(result.Message) > maxMessage || !strings.HasPrefix(result.Message, "üü") {
		t.Errorf("got %d bytes, %v", len(result.Message), err)
	}
}

// TestLongAnswersAreBounded: each long answer arrives at last, and the object never has all of them.
func TestLongAnswersAreBounded(t *testing.T) {
	s := newAPIServer(t)
	long := `"` + strings.Repeat("x", 60<<10) + `"`
	release := make(chan struct{})
	runAgent(t, s, "a", func(context.Context, string, []byte) Result {
		<-release
		return Result{Body: long}
	})
	d := newDispatcher(t, s, "a")
	const calls = 16
	var work sync.WaitGroup
	var again atomic.Int32
	for i := range calls {
		work.Go(func() {
			for {
				result, err := call(t, d, "a", fmt.Sprint("v", i), "List", `{}`)
				switch {
				case err != nil:
					t.Errorf("call %d: %v", i, err)
					return
				case result.Code == 0 && result.Body == long:
					return
				case result.Code != unavailable:
					t.Errorf("call %d: %d %s", i, result.Code, result.Message)
					return
				}
				again.Add(1)
			}
		})
	}
	eventually(t, "all calls are written", func() bool { o := s.get("a"); return o != nil && len(o.Spec.Requests) == calls })
	close(release)
	done := make(chan struct{})
	go func() { work.Wait(); close(done) }()
	eventually(t, "all calls are answered", func() bool {
		if encoded, err := json.Marshal(s.get("a")); err != nil || len(encoded) > 400<<10 {
			t.Fatalf("the object has %d bytes, %v", len(encoded), err)
		}
		select {
		case <-done:
			return true
		default:
			return false
		}
	})
	t.Logf("%d answers were to be asked for again", again.Load())
}

func TestGoneNodes(t *testing.T) {
	s := newAPIServer(t)
	exists := map[string]bool{"there": true}
	d := NewDispatcher(t.Context(), s.client())
	gone := &GoneNodes{Dispatcher: d, Grace: 50 * time.Millisecond, KeepBytes: 1 << 10}
	gone.Exists = func(_ context.Context, name string) (bool, error) { return exists[name], nil }
	if err := gone.Clean(t.Context()); err != nil || d.begun.Load() {
		t.Errorf("a controller that got no request watches the nodes, %v", err)
	}
	for _, node := range []string{"there", "gone", "asked"} {
		if err := gone.Ensure(t.Context(), node); err != nil {
			t.Fatal(err)
		}
		// It was made long ago, and has not reported for long.
		s.mu.Lock()
		s.objects[node+"."+testDriver].CreationTimestamp = metav1.NewTime(time.Now().Add(-2 * silentAfter))
		s.mu.Unlock()
	}
	if err := d.Await(t.Context()); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := d.Call(short, "asked", "v", "Delete", []byte(`{}`)); !errdefs.IsUnavailable(err) {
		t.Fatal(err)
	}
	for _, node := range []string{"there", "gone"} {
		eventually(t, node+" is gone after the grace period, if it is", func() bool {
			object, err := d.Get(node)
			if err != nil {
				t.Fatal(err)
			}
			isGone, err := gone.Check(t.Context(), object)
			if err != nil {
				t.Fatal(err)
			}
			return isGone != exists[node]
		})
	}
	exists["gone"] = true
	object, err := d.Get("gone")
	if err != nil {
		t.Fatal(err)
	}
	if isGone, err := gone.Check(t.Context(), object); isGone || err != nil || s.get("gone").Spec.NodeGoneSince != nil {
		t.Errorf("a node that is back: gone %v, %v, %v", isGone, err, s.get("gone").Spec.NodeGoneSince)
	}
	back := object.DeepCopyObject().(*OverlayNode)
	long := metav1.NewTime(time.Now().Add(-time.Hour))
	back.Spec.NodeGoneSince, back.Status.ReportedAt = &long, metav1.NewTime(time.Now().Add(-time.Minute))
	exists["gone"] = false
	if isGone, err := gone.Check(t.Context(), back); isGone || err != nil {
		t.Errorf("a node that was back since it was gone first: gone %v, %v", isGone, err)
	}
	exists["gone"] = false
	eventually(t, "the object of the node that is gone is removed", func() bool {
		if err := gone.Clean(t.Context()); err != nil {
			t.Fatal(err)
		}
		return s.get("gone") == nil
	})
	if s.get("there") == nil || s.get("asked") == nil {
		t.Error("the object of a node that is there, or that has a request, was removed")
	}
	gone.KeepBytes = 1
	eventually(t, "a node whose requests are too many to be kept is given up", func() bool {
		if err := gone.Clean(t.Context()); err != nil {
			t.Fatal(err)
		}
		return s.get("asked") == nil
	})
	if _, err := s.client().Name(strings.Repeat("n", 240)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a long name: %v", err)
	}
}
