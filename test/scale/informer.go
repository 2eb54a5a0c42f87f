package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
)

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
