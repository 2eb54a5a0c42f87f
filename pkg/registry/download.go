package registry

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"k8s.io/klog/v2"
)

const (
	// maxFailures is the number of consecutive failures without any progress that end a download.
	maxFailures = 5
	// minRate is the minimum rate of a download in bytes a second.
	minRate = 1 << 10
	// slowRate is the minimum rate in bytes a second that a download must have on average over slowPeriod, pauses included.
	slowRate   = 16 << 10
	slowPeriod = 5 * time.Minute
	// transferSize is the size in bytes of one read from a registry, and of one write to it.
	transferSize = 256 << 10
)

// errStalled is the cause of a request that was canceled because it received less than minRate.
var errStalled = errors.New("the registry has stopped sending")

// errSlow is the cause of a download that was canceled because it received less than slowRate.
var errSlow = fmt.Errorf("the registry has sent less than %d KiB/s for %s; retry, what it has sent is kept", slowRate>>10, slowPeriod)

// Progress is the progress of a download.
type Progress struct {
	// Received is the number of bytes in the spool.
	Received atomic.Int64
	// IgnoresRanges reports whether the registry has sent again what was in the spool. A download there begins at the first byte
	// whenever it is continued.
	IgnoresRanges atomic.Bool
}

// Download downloads the rest of a blob to its spool. It retries transient failures from the current offset, with a longer
// pause each time, and keeps progress up to date. It does not verify the blob's digest. It returns ErrUnavailable if the
// registry sends less than slowRate over slowPeriod: a download must not take a slot for months.
func (r *Repository) Download(ctx context.Context, descriptor ocispec.Descriptor, into *Spool, progress *Progress) error {
	open := func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		return r.openBlob(ctx, descriptor, offset)
	}
	d := &download{repository: r, descriptor: descriptor, open: open, into: into, progress: progress}
	return d.run(ctx)
}

// download is the state of one call of Download.
type download struct {
	repository *Repository
	descriptor ocispec.Descriptor
	open       func(ctx context.Context, offset int64) (io.ReadCloser, error)
	into       *Spool
	progress   *Progress
	// sent is the number of bytes that the registry has sent, those that it has sent again included.
	sent atomic.Int64
	// repeats is the number of bytes that the registry has sent again.
	repeats atomic.Int64
}

func (d *download) run(ctx context.Context) error {
	failures, pause := 0, d.repository.config.Backoff
	d.progress.Received.Store(d.into.Len())
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go cancelIfBelow(ctx, cancel, &d.sent, limit{slowRate, slowPeriod, errSlow})
	for {
		before := d.into.Len()
		if before == d.descriptor.Size {
			return nil
		}
		err := d.attempt(ctx)
		if err != nil && errors.Is(context.Cause(ctx), errSlow) {
			return d.repository.wrap(fetchOp(d.descriptor), errSlow)
		}
		if err == nil || ctx.Err() != nil || !errdefs.IsUnavailable(err) {
			return err
		}
		if d.into.Len() > before {
			failures, pause = 0, d.repository.config.Backoff
		}
		if failures++; failures >= maxFailures {
			return fmt.Errorf("%w (tried %d times)", err, failures)
		}
		klog.FromContext(ctx).Info("Retrying download",
			keyLayer, d.descriptor.Digest, keyReceived, d.into.Len(), keySize, d.descriptor.Size, keyReason, err.Error())
		if err := sleep(ctx, pause); err != nil {
			return d.repository.wrap(fetchOp(d.descriptor), err)
		}
		pause *= 2
	}
}

// attempt downloads the rest of the blob in one request.
func (d *download) attempt(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var received atomic.Int64
	go cancelIfBelow(ctx, cancel, &received, limit{minRate, d.repository.config.StallTimeout, errStalled})
	count := func(n int64) {
		received.Add(n)
		d.sent.Add(n)
	}
	repeat := func(n int64) {
		d.progress.IgnoresRanges.Store(true)
		// A registry that cuts each connection could send the same bytes for ever.
		if d.repeats.Add(n) <= maxFailures*d.descriptor.Size {
			count(n)
		}
	}
	ctx = context.WithValue(ctx, repeatedKey{}, &repeated{repeat})
	body, skip, err := d.openAt(ctx, d.into.Len())
	if err != nil {
		return d.repository.wrap(fetchOp(d.descriptor), stallCause(ctx, err))
	}
	defer body.Close()
	buffer := make([]byte, transferSize)
	for {
		n, err := body.Read(buffer)
		if skipped := int(min(skip, int64(n))); skipped > 0 {
			repeat(int64(skipped))
			skip -= int64(skipped)
			n = copy(buffer, buffer[skipped:n])
		}
		count(int64(n))
		if n > 0 {
			if _, err := d.into.Write(buffer[:n]); err != nil {
				return fmt.Errorf("write the download: %w", err)
			}
			d.progress.Received.Store(d.into.Len())
		}
		if done, err := d.check(body, err); done {
			return d.repository.wrap("fetch", stallCause(ctx, err))
		}
	}
}

// check reports whether an attempt is complete after a read that returned err. It returns the error of the attempt.
func (d *download) check(body io.Reader, err error) (done bool, _ error) {
	length := d.into.Len()
	switch {
	case length > d.descriptor.Size, isTooLong(err):
		return true, errTooLong(d.descriptor)
	case length == d.descriptor.Size:
		return true, d.checkEnd(body)
	case errors.Is(err, io.EOF):
		return true, fmt.Errorf("blob %s ends after %d of %d bytes", d.descriptor.Digest, length, d.descriptor.Size)
	}
	return err != nil, err
}

// checkEnd returns an error if the body continues after the size in the descriptor.
func (d *download) checkEnd(body io.Reader) error {
	var more [1]byte
	if n, err := body.Read(more[:]); n > 0 || isTooLong(err) {
		return errTooLong(d.descriptor)
	}
	return nil
}

// openAt opens the blob at offset. A registry without support for ranges sends the whole blob again. The caller must then
// discard the first skip bytes.
func (d *download) openAt(ctx context.Context, offset int64) (body io.ReadCloser, skip int64, err error) {
	body, err = d.open(ctx, offset)
	if err != nil || offset == 0 {
		return body, 0, err
	}
	// The first read sends the request.
	buffered := bufio.NewReader(body)
	_, err = buffered.Peek(1)
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) && status.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		body.Close()
		d.progress.IgnoresRanges.Store(true)
		body, err = d.open(ctx, 0)
		return body, offset, err
	}
	return struct {
		io.Reader
		io.Closer
	}{buffered, body}, 0, nil
}

// limit is a minimum rate in bytes a second over a period, and the error for less.
type limit struct {
	rate   float64
	period time.Duration
	cause  error
}

// cancelIfBelow cancels a request or a transfer with less than a limit. It returns when ctx is done.
func cancelIfBelow(ctx context.Context, cancel context.CancelCauseFunc, received *atomic.Int64, limit limit) {
	ticker := time.NewTicker(limit.period)
	defer ticker.Stop()
	before := received.Load()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := received.Load()
		if now-before < int64(limit.period.Seconds()*limit.rate) {
			cancel(limit.cause)
			return
		}
		before = now
	}
}

// stallCause returns errStalled if a stall canceled the request. Otherwise it returns err.
func stallCause(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), errStalled) {
		return errStalled
	}
	return err
}
