package overlaynode

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// call calls a node with 20 seconds of time.
func call(t *testing.T, d *Dispatcher, node, handle, method, body string) (Result, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return d.Call(ctx, node, handle, method, []byte(body))
}

// echo answers with the method and the body of the request.
func echo(_ context.Context, method string, body []byte) Result {
	answer, err := json.Marshal(map[string]string{"method": method, "body": string(body)})
	if err != nil {
		return Result{Code: 13, Message: err.Error()}
	}
	return Result{Body: answer}
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
		if err != nil || result.Code != 0 || string(result.Body) != want {
			t.Errorf("got %+v, %v; want %s", result, err, want)
		}
	}
	if calls.Load() != 1 {
		t.Errorf("a request that was answered with OK was carried out %d times", calls.Load())
	}
	if result, err := call(t, d, "a", "v", "Delete", `{}`); err != nil || !strings.Contains(string(result.Body), "Delete") {
		t.Errorf("another request about the volume: %+v, %v", result, err)
	}
	for try := range 2 {
		result, err := call(t, d, "b", "v", "Create", `{}`)
		if err != nil || result.Code != 8 || result.Message != "no room" || !strings.HasSuffix(result.ID, fmt.Sprintf("-%d", try+1)) {
			t.Errorf("try %d of what fails: %+v, %v", try, result, err)
		}
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
	if _, err := newDispatcher(t, s, "a").Call(ctx, "a", "v", "Create", []byte(`{}`)); !errdefs.IsUnavailable(err) {
		t.Fatalf("got %v; want that node a has not answered", err)
	}
	close(release)
	if result, err := call(t, newDispatcher(t, s, "a"), "a", "v", "Create", `{}`); err != nil || result.Code != 0 {
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
	if calls.Load() != 10 {
		t.Errorf("10 requests were carried out %d times", calls.Load())
	}
	if writes := s.count("PATCHstatus"); writes > 12 {
		t.Errorf("10 answers took %d writes", writes)
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
		if result, err := call(t, d, "a", "cut", "Hang", `{}`); err != nil || string(result.Body) != `"second"` {
			t.Errorf("got %+v, %v", result, err)
		}
	})
	<-began
	stop()
	if _, answered := s.get("a").answer("cut"); answered {
		t.Error("a driver that ended wrote an answer to what it had not carried out")
	}
	runAgent(t, s, "a", func(_ context.Context, method string, _ []byte) Result {
		if method != "Hang" {
			t.Errorf("%s was carried out again", method)
		}
		return Result{Body: []byte(`"second"`)}
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
	s.remove("a")
	eventually(t, "there is another object", func() bool { o := s.get("a"); return o != nil && !o.Status.ReportedAt.IsZero() })
	eventually(t, "it takes requests", func() bool {
		result, err := call(t, d, "a", "v", "Create", `{}`)
		return err == nil && result.Code == 0
	})
}

// TestAnsweredRequestsAreRemoved: the object does not grow with the number of requests.
func TestAnsweredRequestsAreRemoved(t *testing.T) {
	s := newAPIServer(t)
	runAgent(t, s, "a", echo)
	d := newDispatcher(t, s, "a")
	for i := range 40 {
		if _, err := call(t, d, "a", fmt.Sprintf("v%02d", i), "Create", `{}`); err != nil {
			t.Fatal(err)
		}
	}
	object := s.get("a")
	if n := len(object.Spec.Requests); n > keepAnswered+2 {
		t.Errorf("%d requests are left", n)
	}
	if _, ok := object.Spec.Requests["v39"]; !ok {
		t.Error("the newest request is not left")
	}
	if n := len(object.Status.Results); n > keepAnswered+3 {
		t.Errorf("%d results are left", n)
	}
}

// TestRequestsAreBounded: a node that does not answer does not fill its object.
func TestRequestsAreBounded(t *testing.T) {
	s := newAPIServer(t)
	if err := s.client().ensure(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	d := newDispatcher(t, s, "a")
	for i := range maxWaiting {
		if err := post(t, d, fmt.Sprint(i)); err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
	}
	if err := post(t, d, "further"); !errdefs.IsUnavailable(err) {
		t.Errorf("request %d was taken: %v", maxWaiting, err)
	}
	if n := len(s.get("a").Spec.Requests); n != maxWaiting {
		t.Errorf("%d requests were taken", n)
	}
}

// post writes a request to node a.
func post(t *testing.T, d *Dispatcher, handle string) error {
	t.Helper()
	object, err := d.Get("a")
	if err != nil {
		t.Fatal(err)
	}
	return d.post(t.Context(), object, handle, Request{ID: "x-1", Method: "Create", PostedAt: metav1.Now()})
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

func TestGoneNodes(t *testing.T) {
	s := newAPIServer(t)
	exists := map[string]bool{"there": true}
	d := NewDispatcher(t.Context(), s.client())
	gone := &GoneNodes{Dispatcher: d, Grace: 50 * time.Millisecond}
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
	if _, err := s.client().Name(strings.Repeat("n", 240)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a long name: %v", err)
	}
}
