package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

const (
	// MaxDocumentSize is the maximum size of a manifest, an index or a configuration in bytes.
	MaxDocumentSize = 8 << 20
	// documentCost is the memory that a document takes while it is read and parsed, for each of its bytes: the text, the buffer of the
	// JSON decoder, which doubles, and the strings.
	documentCost = 6
	// SmallDocument is the maximum size of a small document in bytes. Nearly all documents are small.
	SmallDocument = 64 << 10
	// smallMemory and largeMemory are the memory for all small and all other documents in bytes. The first has room for 42 of the largest
	// small documents at a time, and the second for one of MaxDocumentSize.
	smallMemory = 16 << 20
	largeMemory = 64 << 20
)

// Documents bounds the memory for the manifests, indexes and configurations that are read at the same time. Small documents do not wait
// for others.
type Documents struct{ small, large *semaphore.Weighted }

// NewDocuments returns a Documents for all images of a process.
func NewDocuments() *Documents {
	return &Documents{semaphore.NewWeighted(smallMemory), semaphore.NewWeighted(largeMemory)}
}

// Read fetches a document and parses it. It waits until there is memory to parse it, or ctx is done. A registry that sends slowly delays
// nobody else. What parse keeps is not accounted for any more when read returns.
func (d *Documents) Read(ctx context.Context, descriptor ocispec.Descriptor, fetch Fetch, parse func(data []byte) error) error {
	if descriptor.Size < 0 || descriptor.Size > MaxDocumentSize {
		return fmt.Errorf("%w: document %s has %d bytes; the maximum is %d",
			errdefs.ErrInvalidArgument, truncate(string(descriptor.Digest)), descriptor.Size, MaxDocumentSize)
	}
	content, err := fetch(ctx, descriptor)
	if err != nil {
		return err
	}
	defer content.Close()
	memory, cost := d.large, descriptor.Size*documentCost
	if descriptor.Size <= SmallDocument {
		memory = d.small
	}
	if err := memory.Acquire(ctx, cost); err != nil {
		return fmt.Errorf("%w: wait for other images to be read: %w", errdefs.ErrUnavailable, err)
	}
	defer memory.Release(cost)
	data, err := ReadDocument(content, descriptor.Size)
	if err != nil {
		return err
	}
	// encoding/json makes three bytes of each invalid one.
	if !utf8.Valid(data) {
		return fmt.Errorf("%w: document %s is not text in UTF-8", errdefs.ErrInvalidArgument, truncate(string(descriptor.Digest)))
	}
	return parse(data)
}

// ReadDocument reads a document of size bytes, and at most one byte more, which proves that it is too long.
func ReadDocument(from io.Reader, size int64) ([]byte, error) {
	data := bytes.NewBuffer(make([]byte, 0, size+bytes.MinRead))
	_, err := data.ReadFrom(io.LimitReader(from, size+1))
	return data.Bytes(), err
}

// maxListed is the maximum number of elements that are kept of a list in a document. It is more than MaxLayers, and more than the
// platforms of any image.
const maxListed = 1000

// list is a list in a document. It counts all elements, and keeps the first maxListed: a list of "{}" would take forty times the memory
// of its text.
type list[T any] struct {
	items []T
	count int
}

// UnmarshalJSON implements json.Unmarshaler.
func (l *list[T]) UnmarshalJSON(data []byte) error {
	*l = list[T]{}
	decoder := json.NewDecoder(bytes.NewReader(data))
	switch token, err := decoder.Token(); {
	case err != nil:
		return err
	case token == nil:
		return nil
	case token != json.Delim('['):
		return fmt.Errorf("found %s; want a list", truncate(string(data)))
	}
	l.count = countElements(data)
	for range min(l.count, maxListed) {
		var item T
		if err := decoder.Decode(&item); err != nil {
			return err
		}
		l.items = append(l.items, item)
	}
	return nil
}

// countElements returns the number of elements of a valid list.
func countElements(data []byte) int {
	depth, commas, isEmpty, isText := 0, 0, true, false
	for i := 0; i < len(data); i++ {
		switch char := data[i]; {
		case isText && char == '\\':
			i++
		case char == '"':
			isText, isEmpty = !isText, false
		case isText:
		case char == '[', char == '{':
			isEmpty = isEmpty && depth == 0
			depth++
		case char == ']', char == '}':
			depth--
		case char == ',' && depth == 1:
			commas++
		case char > ' ':
			isEmpty = false
		}
	}
	if isEmpty {
		return 0
	}
	return commas + 1
}

// skipped is any value that is not kept.
type skipped struct{}

// UnmarshalJSON implements json.Unmarshaler.
func (*skipped) UnmarshalJSON([]byte) error { return nil }
