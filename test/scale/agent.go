package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"k8s.io/client-go/rest"

	"github.com/overlay-csi/overlay-csi/pkg/overlaynode"
)

// agentNode is a node that has the driver alone: the driver's own agent, with a client and a connection of its own, in front of volumes
// that are only remembered.
type agentNode struct {
	name     string
	config   *rest.Config
	counters *counters
	free     atomic.Int64

	mu      sync.Mutex
	volumes map[string]int64 // sizes by handle
}

// reportInterval is the default of the driver's --capacity-report-interval.
const reportInterval = time.Minute

func newAgentNode(c *cluster, name string) *agentNode {
	n := &agentNode{name: name, counters: c.counters, volumes: map[string]int64{}}
	dialer := &net.Dialer{Timeout: 30 * time.Second}
	n.config = &rest.Config{
		Host: c.url, BearerToken: c.token, UserAgent: "overlay-csi/agent (linux/amd64)",
		TLSClientConfig: rest.TLSClientConfig{Insecure: true}, // The server is this test's own.
		// Clients with the same configuration would share a connection: each needs a dialer of its own.
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return countingConn{conn, &c.counters.wire}, nil
		},
		WrapTransport: func(next http.RoundTripper) http.RoundTripper { return countingTransport{next, c.counters} },
	}
	n.free.Store(1 << 40)
	return n
}

// run runs the agent until the context ends, and calls ready once it has written its OverlayNode.
func (n *agentNode) run(ctx context.Context, ready func()) {
	client, err := overlaynode.NewClient(n.config, namespace, driverName)
	if err != nil {
		n.counters.report(err)
		return
	}
	once := sync.OnceFunc(ready)
	agent, err := overlaynode.NewAgent(overlaynode.AgentConfig{
		Client: client, Node: n.name, Handle: n.handle, ReportInterval: reportInterval,
		Capacity: func(context.Context) (int64, error) {
			// It is asked for what to write in the object, so the object is there.
			once()
			return n.free.Add(-1 << 20), nil
		},
	})
	if err != nil {
		n.counters.report(err)
		return
	}
	agent.Run(ctx)
}

// handle answers as driver.ForwardedTo does.
func (n *agentNode) handle(_ context.Context, method string, body []byte) overlaynode.Result {
	var request, response proto.Message
	var answer func()
	switch method {
	case "CreateVolume":
		create, created := &csi.CreateVolumeRequest{}, &csi.CreateVolumeResponse{}
		request, response, answer = create, created, func() { created.Volume = n.create(create) }
	case "DeleteVolume":
		deletion := &csi.DeleteVolumeRequest{}
		request, response, answer = deletion, &csi.DeleteVolumeResponse{}, func() { n.remove(deletion.GetVolumeId()) }
	default:
		return overlaynode.Result{Code: uint32(codes.Unimplemented), Message: method + " is not played"}
	}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(body, request); err != nil {
		n.counters.report(err)
		return overlaynode.Result{Code: uint32(codes.InvalidArgument), Message: err.Error()}
	}
	answer()
	encoded, err := protojson.Marshal(response)
	if err != nil {
		n.counters.report(err)
		return overlaynode.Result{Code: uint32(codes.Internal), Message: err.Error()}
	}
	return overlaynode.Result{Body: string(encoded)}
}

func (n *agentNode) create(request *csi.CreateVolumeRequest) *csi.Volume {
	handle, size := request.GetName(), request.GetCapacityRange().GetRequiredBytes()
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, known := n.volumes[handle]; !known {
		n.volumes[handle] = size
		n.free.Add(-size)
	}
	return &csi.Volume{CapacityBytes: size}
}

func (n *agentNode) remove(handle string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	size, known := n.volumes[handle]
	if !known {
		return // It was deleted, and the answer did not arrive.
	}
	delete(n.volumes, handle)
	n.free.Add(size)
}

// countingTransport counts the writes of OverlayNodes that have no result in them, and the bookmarks of watches: their number depends on
// that of the nodes, and not on that of the claims.
type countingTransport struct {
	next     http.RoundTripper
	counters *counters
}

// RoundTrip is part of http.RoundTripper.
func (t countingTransport) RoundTrip(request *http.Request) (*http.Response, error) {
	if request.Method == http.MethodPatch && request.GetBody != nil {
		body, err := request.GetBody()
		if err != nil {
			return nil, err
		}
		text, err := io.ReadAll(body)
		if err != nil {
			return nil, err
		}
		if !bytes.Contains(text, []byte(`"results"`)) {
			t.counters.beats.Add(1)
		}
	}
	response, err := t.next.RoundTrip(request)
	if err == nil && response.StatusCode >= http.StatusBadRequest {
		t.counters.failed.Add(1)
		t.counters.report(&statusError{code: response.StatusCode, method: request.Method, path: "/overlaynodes"})
	}
	if err == nil && request.URL.Query().Has("watch") {
		response.Body = countingBody{response.Body, t.counters}
	}
	return response, err
}

// countingBody counts the bookmarks in the stream of a watch. The API server sends each watch one a minute.
type countingBody struct {
	io.ReadCloser
	counters *counters
}

// Read is part of io.Reader.
func (b countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.counters.bookmarks.Add(int64(bytes.Count(p[:n], []byte(`"type":"BOOKMARK"`))))
	return n, err
}
