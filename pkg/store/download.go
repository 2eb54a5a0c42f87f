package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync/atomic"
	"time"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"k8s.io/klog/v2"
)

const (
	// maxFailures is how often in a row a registry may fail without sending anything.
	maxFailures = 5
	// minRate is the least that a registry must send, in bytes a second.
	minRate = 1 << 10
	// downloadSize is how much is read from a registry at once.
	downloadSize = 256 << 10
)

// errStalled says that a registry sends next to nothing.
var errStalled = errors.New("the registry has stopped sending")

// download fetches the rest of a blob into its spool. What fails in a way that may pass is tried again with a longer
// pause each time, from where it was.
func (s *Store) download(ctx context.Context, repo *repository, src source, into *spool, progress *atomic.Int64) error {
	failures, pause := 0, s.config.Backoff
	for {
		before := into.length()
		if before == src.descriptor.Size {
			return nil
		}
		err := s.attempt(ctx, repo, src, into, progress)
		if err == nil || ctx.Err() != nil || !isTransient(err) {
			return err
		}
		if into.length() > before {
			failures, pause = 0, s.config.Backoff
		}
		if failures++; failures >= maxFailures {
			return fmt.Errorf("%w (tried %d times)", err, failures)
		}
		klog.FromContext(ctx).Info("A download is tried again", "layer", src.descriptor.Digest, "bytes", into.length(), "of", src.descriptor.Size, "reason", err.Error())
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause + rand.N(pause/4+1)):
		}
		pause *= 2
	}
}

// isTransient reports whether an error of a registry may pass. One that was about access or about the content will not.
func isTransient(err error) bool { return errdefs.IsUnavailable(err) }

// attempt is one request.
func (s *Store) attempt(ctx context.Context, repo *repository, src source, into *spool, progress *atomic.Int64) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var received atomic.Int64
	go watch(ctx, cancel, &received, s.config.StallTimeout)
	body, skip, err := s.openBlob(ctx, repo, src, into.length())
	if err != nil {
		return stalled(ctx, repo, err)
	}
	defer body.Close()
	buffer := make([]byte, downloadSize)
	for {
		n, err := body.Read(buffer)
		if skipped := int(min(skip, int64(n))); skipped > 0 {
			received.Add(int64(skipped))
			skip -= int64(skipped)
			n = copy(buffer, buffer[skipped:n])
		}
		if n > 0 {
			received.Add(int64(n))
			if _, err := into.Write(buffer[:n]); err != nil {
				return fmt.Errorf("write what was downloaded: %w", err)
			}
			progress.Store(into.length())
		}
		switch {
		case into.length() > src.descriptor.Size, errdefs.IsFailedPrecondition(err):
			return repo.explain("fetch", tooLong(src.descriptor))
		case into.length() == src.descriptor.Size:
			return s.checkEnd(repo, src, body)
		case errors.Is(err, io.EOF):
			return repo.explain("fetch", fmt.Errorf("%s ends after %d of %d bytes", src.descriptor.Digest, into.length(), src.descriptor.Size))
		case err != nil:
			return stalled(ctx, repo, repo.explain("fetch", err))
		}
	}
}

// checkEnd refuses a blob that goes on behind its end.
func (s *Store) checkEnd(repo *repository, src source, body io.Reader) error {
	var more [1]byte
	if n, err := body.Read(more[:]); n > 0 || errdefs.IsFailedPrecondition(err) {
		return repo.explain("fetch", tooLong(src.descriptor))
	}
	return nil
}

func tooLong(descriptor ocispec.Descriptor) error {
	return fmt.Errorf("%w: %s has more than %d bytes", errLied, descriptor.Digest, descriptor.Size)
}

// openBlob opens a blob from offset on. A registry that has no ranges gives all of it again: then the bytes to skip are
// not none.
func (s *Store) openBlob(ctx context.Context, repo *repository, src source, offset int64) (body io.ReadCloser, skip int64, err error) {
	body, err = repo.blob(ctx, src.descriptor, offset)
	if err != nil || offset == 0 {
		return body, 0, err
	}
	// The request is made when the first byte is read.
	buffered := bufio.NewReader(body)
	_, err = buffered.Peek(1)
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) && status.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		body.Close()
		body, err = repo.blob(ctx, src.descriptor, 0)
		return body, offset, err
	}
	return struct {
		io.Reader
		io.Closer
	}{buffered, body}, 0, nil
}

// watch cancels a request during which less than minRate comes for the whole of a timeout.
func watch(ctx context.Context, cancel context.CancelCauseFunc, received *atomic.Int64, timeout time.Duration) {
	ticker := time.NewTicker(timeout)
	defer ticker.Stop()
	before := int64(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := received.Load()
		if now-before < int64(timeout.Seconds()*minRate) {
			cancel(errStalled)
			return
		}
		before = now
	}
}

// stalled says so where that is why a request ended.
func stalled(ctx context.Context, repo *repository, err error) error {
	if errors.Is(context.Cause(ctx), errStalled) {
		return repo.explain("fetch", errStalled)
	}
	return err
}
