package registry

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"time"
)

// pauseBeforeRepeats waits where containerd would repeat a request at once: after a body that was cut off, however often it is, and after
// an answer that the registry is too busy.
func pauseBeforeRepeats(pause time.Duration, next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(request *http.Request) (*http.Response, error) {
		response, err := next.RoundTrip(request)
		if err != nil {
			return nil, err
		}
		response.Body = &cutBody{response.Body, request.Context(), pause}
		if response.StatusCode == http.StatusTooManyRequests || response.StatusCode == http.StatusRequestTimeout {
			if err := sleep(request.Context(), pause); err != nil {
				return nil, errors.Join(err, response.Body.Close())
			}
		}
		return response, nil
	})
}

// cutBody is a body whose reader is told that it was cut off after a pause.
type cutBody struct {
	io.ReadCloser
	ctx   context.Context
	pause time.Duration
}

func (b *cutBody) Read(buffer []byte) (int, error) {
	n, err := b.ReadCloser.Read(buffer)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		if ended := sleep(b.ctx, b.pause); ended != nil {
			return n, ended
		}
	}
	return n, err
}

// sleep waits for a pause and up to a quarter more. It returns the cause of the end of ctx, if that comes first.
func sleep(ctx context.Context, pause time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(pause + rand.N(pause/4+1)):
		return nil
	}
}
