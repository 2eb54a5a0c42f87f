package registry

import (
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(request *http.Request) (*http.Response, error) { return f(request) }

// maxTokenAnswer is the maximum size of the answer of a token server in bytes.
const maxTokenAnswer = 1 << 20

var errTokenAnswer = fmt.Errorf("%w: the token server's answer has more than %d bytes", errdefs.ErrFailedPrecondition, maxTokenAnswer)

// boundedBody returns errTokenAnswer after left bytes.
type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(buffer []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTokenAnswer
	}
	n, err := b.ReadCloser.Read(buffer[:min(int64(len(buffer)), b.left)])
	b.left -= int64(n)
	return n, err
}

// acceptIdentity asks for content as it is, which containerd does not. Images are compressed already, and the range of a request is one of
// what is transferred. It returns an error for an answer that is compressed with zstd all the same: containerd would decompress it with
// windows of up to 512 MiB.
func acceptIdentity(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(request *http.Request) (*http.Response, error) {
		request = request.Clone(request.Context())
		request.Header.Set("Accept-Encoding", "identity")
		response, err := next.RoundTrip(request)
		if err != nil {
			return nil, err
		}
		if encoding := strings.Join(response.Header.Values("Content-Encoding"), ","); strings.Contains(strings.ToLower(encoding), "zstd") {
			response.Body.Close()
			return nil, fmt.Errorf("%w: %s answers with the content encoding zstd, which was not asked for; turn it off there",
				errdefs.ErrInvalidArgument, request.URL.Host)
		}
		return response, nil
	})
}

// repeated counts the bytes that a registry sends although the request was for what comes after them.
type repeated struct{ add func(n int64) }

// repeatedKey is the context key of the *repeated of a request.
type repeatedKey struct{}

// countRepeated counts what a registry sends again that ignores the range of a request. containerd discards it before it returns a body,
// so that nothing above it sees whether the registry sends.
func countRepeated(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(request *http.Request) (*http.Response, error) {
		response, err := next.RoundTrip(request)
		counter, ok := request.Context().Value(repeatedKey{}).(*repeated)
		if err != nil || !ok || response.StatusCode != http.StatusOK || response.Header.Get("Content-Range") != "" {
			return response, err
		}
		var offset int64
		if _, err := fmt.Sscanf(request.Header.Get("Range"), "bytes=%d-", &offset); err == nil && offset > 0 {
			response.Body = &repeatingBody{response.Body, counter, offset}
		}
		return response, nil
	})
}

// repeatingBody is a body whose first left bytes are repeated.
type repeatingBody struct {
	io.ReadCloser
	counter *repeated
	left    int64
}

func (b *repeatingBody) Read(buffer []byte) (int, error) {
	n, err := b.ReadCloser.Read(buffer)
	if count := min(int64(n), b.left); count > 0 {
		b.left -= count
		b.counter.add(count)
	}
	return n, err
}

// discardLogger returns a logger that only calls hooks. The errors that containerd returns repeat its log messages.
func discardLogger(hooks ...logrus.Hook) *log.Entry {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.SetLevel(logrus.ErrorLevel)
	for _, hook := range hooks {
		logger.AddHook(hook)
	}
	return logrus.NewEntry(logger)
}

// firstLoggedError is a hook that stores the first error that is logged.
type firstLoggedError struct{ message string }

// Levels implements logrus.Hook.
func (*firstLoggedError) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

// Fire implements logrus.Hook.
func (h *firstLoggedError) Fire(entry *logrus.Entry) error {
	if h.message == "" {
		h.message = fmt.Sprintf("%s: %v", entry.Message, entry.Data[logrus.ErrorKey])
	}
	return nil
}
