package registry

import (
	"fmt"
	"io"
	"net/http"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(request *http.Request) (*http.Response, error) { return f(request) }

// maxTokenAnswer is the maximum size of the answer of a token server in bytes.
const maxTokenAnswer = 1 << 20

// boundedBody returns an error after left bytes.
type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(buffer []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("%w: the token server's answer has more than %d bytes", errdefs.ErrFailedPrecondition, maxTokenAnswer)
	}
	n, err := b.ReadCloser.Read(buffer[:min(int64(len(buffer)), b.left)])
	b.left -= int64(n)
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
