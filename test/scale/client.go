package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/util/flowcontrol"
)

// counters are what all played processes have done together.
type counters struct {
	requests, failed, throttled atomic.Int64
	watches, synced, relists    atomic.Int64
	events, eventBytes, wire    atomic.Int64
	beats                       atomic.Int64 // writes of an OverlayNode without results
	bookmarks                   atomic.Int64 // in watches of an OverlayNode

	mu         sync.Mutex
	unexpected map[string]int
}

// report notes an error of a played process that the real one would log.
func (c *counters) report(err error) {
	if err == nil || errors.Is(err, context.Canceled) {
		return
	}
	text := err.Error()
	var status *statusError
	if errors.As(err, &status) {
		text = status.brief()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unexpected == nil {
		c.unexpected = map[string]int{}
	}
	if _, known := c.unexpected[text]; known || len(c.unexpected) < 20 {
		c.unexpected[text]++
	}
}

func (p *process) report(err error) { p.counters.report(err) }

// process plays one program on a node: it has a connection of its own to the API server, and the user agent of the program.
type process struct {
	base, token, agent string
	client             *http.Client
	counters           *counters
	limiter            flowcontrol.RateLimiter
}

const (
	protobufType = "application/vnd.kubernetes.protobuf"
	jsonType     = "application/json"
)

// newProcess returns a process that makes at most qps requests a second, watches included, as client-go counts them.
func newProcess(base, token, agent string, qps float32, burst int, c *counters) *process {
	dialer := &net.Dialer{Timeout: 30 * time.Second}
	transport := &http.Transport{
		ForceAttemptHTTP2: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // The server is this test's own.
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return countingConn{conn, &c.wire}, nil
		},
	}
	return &process{
		base: base, token: token, agent: agent, client: &http.Client{Transport: transport}, counters: c,
		limiter: flowcontrol.NewTokenBucketRateLimiter(qps, burst),
	}
}

// second is the process with another rate limit on the same connection, like a second clientset of a program.
func (p *process) second(qps float32, burst int) *process {
	other := *p
	other.limiter = flowcontrol.NewTokenBucketRateLimiter(qps, burst)
	return &other
}

type countingConn struct {
	net.Conn
	received *atomic.Int64
}

func (c countingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.received.Add(int64(n))
	return n, err
}

// statusError is an answer that is not a success.
type statusError struct {
	code               int
	method, path, text string
}

func (e *statusError) Error() string {
	return fmt.Sprintf("%s %s: status %d: %s", e.method, e.path, e.code, e.text)
}

// brief leaves out the names of objects, so that errors can be counted.
func (e *statusError) brief() string {
	parts := strings.Split(e.path, "/")
	if last := len(parts) - 1; strings.ContainsAny(parts[last], "-0123456789") {
		parts[last] = "NAME"
	}
	return fmt.Sprintf("%s %s: status %d", e.method, strings.Join(parts, "/"), e.code)
}

func isStatus(err error, code int) bool {
	var status *statusError
	return errors.As(err, &status) && status.code == code
}

// do makes a request. body and answer are objects of the API or nil; the wire has them as contentType.
func (p *process) do(ctx context.Context, method, path, contentType string, body any, answer runtime.Object) error {
	var content []byte
	switch body := body.(type) {
	case nil:
	case []byte:
		content = body
	case runtime.Object:
		var err error
		if content, err = encode(body, contentType); err != nil {
			return err
		}
	}
	accept := contentType
	switch contentType {
	case strategicPatch:
		accept = protobufType
	}
	response, err := p.send(ctx, method, path, contentType, accept, content)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode >= http.StatusBadRequest {
		p.counters.failed.Add(1)
		return &statusError{response.StatusCode, method, path, string(data[:min(len(data), 300)])}
	}
	if answer == nil {
		return nil
	}
	_, _, err = scheme.Codecs.UniversalDeserializer().Decode(data, nil, answer)
	return err
}

const strategicPatch = "application/strategic-merge-patch+json"

// send makes a request, and makes it again where the API server asks for that, up to ten times, as client-go does.
func (p *process) send(ctx context.Context, method, path, contentType, accept string, content []byte) (*http.Response, error) {
	for retries := 0; ; retries++ {
		if err := p.limiter.Wait(ctx); err != nil {
			return nil, err
		}
		request, err := http.NewRequestWithContext(ctx, method, p.base+path, bytes.NewReader(content))
		if err != nil {
			return nil, err
		}
		request.Header.Set("Authorization", "Bearer "+p.token)
		request.Header.Set("User-Agent", p.agent)
		request.Header.Set("Accept", accept)
		if content != nil {
			request.Header.Set("Content-Type", contentType)
		}
		p.counters.requests.Add(1)
		response, err := p.client.Do(request)
		if err != nil || response.StatusCode != http.StatusTooManyRequests {
			return response, err
		}
		p.counters.throttled.Add(1)
		seconds, err := strconv.Atoi(response.Header.Get("Retry-After"))
		if err != nil || retries == 10 {
			return response, nil
		}
		if err := response.Body.Close(); err != nil {
			return nil, err
		}
		if !sleep(ctx, time.Duration(seconds)*time.Second) {
			return nil, ctx.Err()
		}
	}
}

// encode returns an object as the API's clients send it.
func encode(object runtime.Object, contentType string) ([]byte, error) {
	info, ok := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), contentType)
	if !ok {
		return nil, fmt.Errorf("no serializer for %s", contentType)
	}
	kinds, _, err := scheme.Scheme.ObjectKinds(object)
	if err != nil {
		return nil, err
	}
	return runtime.Encode(scheme.Codecs.EncoderForVersion(info.Serializer, kinds[0].GroupVersion()), object)
}
