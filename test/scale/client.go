package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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

// informer is one informer of a process: a watch that begins with the objects that there are, as client-go's do since 1.35. It keeps
// no objects. What arrives is counted, and handed to on as it stands on the wire.
type informer struct {
	path, contentType string
	selector          url.Values
	on                func(event string, object []byte)
}

// inform runs an informer until the context ends, and calls synced once the existing objects have arrived.
func (p *process) inform(ctx context.Context, i informer, synced func()) {
	p.counters.watches.Add(1)
	version := ""
	for first := true; ctx.Err() == nil; first = false {
		if !first && version == "" {
			p.counters.relists.Add(1)
		}
		var err error
		version, err = p.watch(ctx, i, version, func() {
			if synced != nil {
				p.counters.synced.Add(1)
				synced()
				synced = nil
			}
		})
		if err == nil || ctx.Err() != nil {
			continue
		}
		// client-go backs off from 0.8 s to 30 s, and starts from the beginning where the version is too old.
		if isStatus(err, http.StatusGone) {
			version = ""
		}
		p.report(err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration((0.8 + rand.Float64()) * float64(time.Second))):
		}
	}
}

// watch makes one request of an informer, and returns the version from which the next one goes on.
func (p *process) watch(ctx context.Context, i informer, version string, synced func()) (string, error) {
	seconds := strconv.Itoa(300 + rand.IntN(300))
	query := url.Values{"allowWatchBookmarks": {"true"}, "watch": {"true"}, "timeoutSeconds": {seconds}, "timeout": {seconds + "s"}}
	maps.Copy(query, i.selector)
	if version == "" {
		query.Set("sendInitialEvents", "true")
		query.Set("resourceVersionMatch", "NotOlderThan")
	} else {
		query.Set("resourceVersion", version)
	}
	accept := jsonType
	if i.contentType == protobufType {
		accept = protobufType + ",application/json"
	}
	response, err := p.send(ctx, http.MethodGet, i.path+"?"+query.Encode(), "", accept, nil)
	if err != nil {
		return version, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		data, _ := io.ReadAll(io.LimitReader(response.Body, 300))
		return version, &statusError{response.StatusCode, "WATCH", i.path, string(data)}
	}
	next := nextJSON
	if i.contentType == protobufType {
		next = nextProtobuf
	}
	reader := bufio.NewReaderSize(response.Body, 2048)
	var frame, object []byte
	var event string
	for {
		if frame, err = readFrame(reader, i.contentType, frame); err != nil {
			// What the last event was of, is still in the buffer.
			if event != "" {
				version = versionOf(object)
			}
			return version, ended(err)
		}
		if event, object, err = next(frame); err != nil {
			return "", err
		}
		p.counters.events.Add(1)
		p.counters.eventBytes.Add(int64(len(frame)))
		switch event {
		case "BOOKMARK":
			synced()
		case "ERROR":
			return "", fmt.Errorf("watch %s: %w", i.path, asError(object))
		default:
			if i.on != nil {
				i.on(event, object)
			}
		}
	}
}

// asError returns the error that an ERROR event has.
func asError(object []byte) error {
	var status metav1.Status
	if err := decode(object, &status); err != nil {
		return err
	}
	return &statusError{code: int(status.Code), method: "WATCH", path: string(status.Reason), text: status.Message}
}

// ended takes the end of a stream for no error: the API server ends every watch after some minutes.
func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// readFrame reads the next event into buffer: a length and as many bytes, or a line of JSON.
func readFrame(reader *bufio.Reader, contentType string, buffer []byte) ([]byte, error) {
	if contentType != protobufType {
		buffer = buffer[:0]
		for {
			part, err := reader.ReadSlice('\n')
			buffer = append(buffer, part...)
			if err == nil {
				return buffer, nil
			}
			if !errors.Is(err, bufio.ErrBufferFull) {
				return buffer, err
			}
		}
	}
	var head [4]byte
	if _, err := io.ReadFull(reader, head[:]); err != nil {
		return buffer, err
	}
	length := int(binary.BigEndian.Uint32(head[:]))
	if cap(buffer) < length {
		buffer = make([]byte, length)
	}
	buffer = buffer[:length]
	_, err := io.ReadFull(reader, buffer)
	return buffer, err
}

// nextProtobuf takes a metav1.WatchEvent apart without copying the object: field 1 is the type, field 2 a RawExtension, whose field 1
// is the object.
func nextProtobuf(frame []byte) (event string, object []byte, err error) {
	kind, err := protobufField(frame, 1)
	if err != nil {
		return "", nil, err
	}
	extension, err := protobufField(frame, 2)
	if err != nil {
		return "", nil, err
	}
	object, err = protobufField(extension, 1)
	return string(kind), object, err
}

func protobufField(message []byte, number protowire.Number) ([]byte, error) {
	for len(message) > 0 {
		found, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		message = message[n:]
		if found == number && kind == protowire.BytesType {
			value, n := protowire.ConsumeBytes(message)
			if n < 0 {
				return nil, protowire.ParseError(n)
			}
			return value, nil
		}
		if n = protowire.ConsumeFieldValue(found, kind, message); n < 0 {
			return nil, protowire.ParseError(n)
		}
		message = message[n:]
	}
	return nil, fmt.Errorf("a watch event without field %d", number)
}

func nextJSON(frame []byte) (string, []byte, error) {
	var event struct {
		Type   string
		Object json.RawMessage
	}
	err := json.Unmarshal(frame, &event)
	return event.Type, event.Object, err
}

// versionOf returns the resource version of an encoded object.
func versionOf(object []byte) string {
	decoded, err := runtime.Decode(scheme.Codecs.UniversalDeserializer(), object)
	if err == nil {
		if accessor, ok := decoded.(metav1.Object); ok {
			return accessor.GetResourceVersion()
		}
		return ""
	}
	var partial metav1.PartialObjectMetadata
	if json.Unmarshal(object, &partial) != nil {
		return ""
	}
	return partial.ResourceVersion
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
