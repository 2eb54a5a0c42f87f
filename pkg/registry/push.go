package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

const (
	// finishTimeouts is the maximum time in which a registry must answer when it has received a blob, in stall timeouts. It may copy the blob
	// then, which takes minutes for a large one.
	finishTimeouts = 20
	// maxRounds is how often a push begins again where the registry lost a blob that it had.
	maxRounds = 3
	// maxAsked is how often a registry may ask for a blob again in one attempt, for example by redirects.
	maxAsked = 5
)

var (
	// errNotTaking is the cause of a request that was canceled because less than minRate of its content could be sent.
	errNotTaking = errors.New("the registry has stopped receiving")
	// errSlowPush is the cause of a push that was canceled because less than slowRate could be sent.
	errSlowPush = fmt.Errorf("the registry has received less than %d KiB/s for %s; retry, blobs that it has are not sent again",
		slowRate>>10, slowPeriod)
	// errNoAnswer is the cause of a request that was canceled because its answer took too long.
	errNoAnswer = errors.New("the registry does not answer after it received the content")
)

// Content is a blob or a manifest that is pushed.
type Content struct {
	Descriptor ocispec.Descriptor
	// Open opens the content. It is called again if it must be sent again.
	Open func(ctx context.Context) (io.ReadCloser, error)
	// Origin is a repository that has the content, or nil. If it is of the same registry, nothing is sent where the registry permits it.
	Origin *Repository
}

// Bytes returns content that is in memory.
func Bytes(descriptor ocispec.Descriptor, data []byte) Content {
	return Content{Descriptor: descriptor, Open: func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(data)), nil
	}}
}

// Content returns a blob of the repository for a push to another one. It is copied without a file or memory for all of it.
func (r *Repository) Content(descriptor ocispec.Descriptor) Content {
	return Content{Descriptor: descriptor, Origin: r, Open: func(ctx context.Context) (io.ReadCloser, error) {
		return r.OpenBlob(ctx, descriptor)
	}}
}

// OpenBlob opens a blob. The caller verifies it. Its errors are of type *Error.
func (r *Repository) OpenBlob(ctx context.Context, descriptor ocispec.Descriptor) (io.ReadCloser, error) {
	body, err := r.openBlob(ctx, descriptor, 0)
	if err != nil {
		return nil, r.wrap(fetchOp(descriptor), err)
	}
	return &wrappedBody{body, r, fetchOp(descriptor)}, nil
}

// wrappedBody is a body whose errors are those of its repository.
type wrappedBody struct {
	io.ReadCloser
	repository *Repository
	op         string
}

func (b *wrappedBody) Read(buffer []byte) (int, error) {
	n, err := b.ReadCloser.Read(buffer)
	if err != nil && !errors.Is(err, io.EOF) {
		err = b.repository.wrap(b.op, err)
	}
	return n, err
}

// Push sends blobs and then the manifest that lists them. The manifest gets the tag of the repository's name, if it has one. What the
// registry has is not sent, so that a push which was interrupted goes on with the rest when it is repeated. sent is kept up to date with
// the number of bytes that the registry has. Push retries transient failures; the error of one that is left wraps errdefs.ErrUnavailable.
func (r *Repository) Push(ctx context.Context, manifest Content, blobs []Content, sent *atomic.Int64) error {
	for round := 1; ; round++ {
		sent.Store(0)
		group, inGroup := errgroup.WithContext(ctx)
		for _, blob := range blobs {
			group.Go(func() error { return r.pushContent(inGroup, blob, sent) })
		}
		if err := group.Wait(); err != nil {
			return err
		}
		err := r.pushContent(ctx, manifest, sent)
		if err == nil || round == maxRounds || !errors.Is(err, errBlobLost) {
			return err
		}
		klog.FromContext(ctx).Info("Repeating push", keyReason, err.Error())
	}
}

// pushContent sends one blob or manifest, unless the registry has it. It retries transient failures.
func (r *Repository) pushContent(ctx context.Context, what Content, sent *atomic.Int64) error {
	if err := r.client.sending.Acquire(ctx, 1); err != nil {
		return r.wrap(pushOp(what.Descriptor), err)
	}
	defer r.client.sending.Release(1)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	transfer := &upload{repository: r, what: what, sent: sent}
	go cancelIfBelow(ctx, cancel, &transfer.moved, limit{slowRate, slowPeriod, errSlowPush})
	pause := r.config.Backoff
	for failures := 1; ; failures++ {
		err := transfer.attempt(ctx)
		switch {
		case err == nil:
			return nil
		case errors.Is(context.Cause(ctx), errSlowPush):
			return r.wrapPush(what.Descriptor, errSlowPush)
		case ctx.Err() != nil || !errdefs.IsUnavailable(err) || errors.Is(err, errBlobLost):
			return err
		case failures == maxFailures:
			return fmt.Errorf("%w (tried %d times)", err, failures)
		}
		klog.FromContext(ctx).Info("Retrying push", keyBlob, what.Descriptor.Digest, keySize, what.Descriptor.Size, keyReason, err.Error())
		if err := sleep(ctx, pause); err != nil {
			return r.wrap(pushOp(what.Descriptor), err)
		}
		pause *= 2
	}
}

// upload is the state of one call of pushContent.
type upload struct {
	repository *Repository
	what       Content
	// sent is the counter of the push, and counted what this upload has added to it.
	sent    *atomic.Int64
	counted int64
	// moved is the number of bytes that were sent, those that were sent again included.
	moved atomic.Int64
	// reading is set while the content is waited for.
	reading atomic.Bool
}

// attempt asks whether the registry has the content, and sends it if not.
func (u *upload) attempt(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watched, unwatch := context.WithCancel(ctx)
	defer unwatch()
	go cancelIfBelow(watched, cancel, &u.moved, limit{minRate, u.repository.config.StallTimeout, errNotTaking})
	received := func() (stop func()) {
		unwatch()
		timer := time.AfterFunc(finishTimeouts*u.repository.config.StallTimeout, func() { cancel(errNoAnswer) })
		return func() { timer.Stop() }
	}
	err := u.send(log.WithLogger(ctx, discardLogger()), received)
	if err == nil {
		u.count(u.what.Descriptor.Size - u.counted)
		return nil
	}
	u.count(-u.counted)
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errNotTaking) && u.what.Origin != nil && u.reading.Load():
		return u.what.Origin.wrap(fetchOp(u.what.Descriptor), errStalled)
	case errors.Is(cause, errNotTaking), errors.Is(cause, errNoAnswer):
		err = cause
	}
	return u.repository.wrapPush(u.what.Descriptor, err)
}

func (u *upload) count(n int64) {
	u.counted += n
	u.sent.Add(n)
}

// send sends the content in one request. received is called when the registry has all of it.
func (u *upload) send(ctx context.Context, received func() (stop func())) error {
	// Another resolver has neither what an earlier attempt has learned nor its failure to get a token.
	pusher, err := docker.NewResolver(u.repository.options).Pusher(ctx, u.repository.named.String())
	if err != nil {
		return err
	}
	writer, err := pusher.Push(ctx, u.descriptor())
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer writer.Close()
	for range maxAsked {
		err = u.write(ctx, writer, received)
		if !errors.Is(err, content.ErrReset) {
			return err
		}
		// The registry redirects the request, or asks for another login.
		u.count(-u.counted)
	}
	return fmt.Errorf("%w: the registry has asked for the content %d times", errdefs.ErrUnavailable, maxAsked)
}

// descriptor returns the descriptor with the repository that the registry may take the blob from.
func (u *upload) descriptor() ocispec.Descriptor {
	descriptor := u.what.Descriptor
	if origin := u.what.Origin; origin != nil && origin.registry == u.repository.registry {
		descriptor.Annotations = maps.Clone(descriptor.Annotations)
		if descriptor.Annotations == nil {
			descriptor.Annotations = map[string]string{}
		}
		descriptor.Annotations[labels.LabelDistributionSource+"."+hostName(origin.registry)] = reference.Path(origin.named)
	}
	return descriptor
}

// write writes the content to a request from its beginning, verifies it, and waits for the answer.
func (u *upload) write(ctx context.Context, to content.Writer, received func() (stop func())) error {
	body, err := u.what.Open(ctx)
	if err != nil {
		return err
	}
	defer body.Close()
	from := image.NewVerifyingReader(image.LayerBlob{Descriptor: u.what.Descriptor}, body)
	buffer := make([]byte, min(transferSize, u.what.Descriptor.Size+1))
	for {
		u.reading.Store(true)
		n, readErr := from.Read(buffer)
		if readErr != nil && !errors.Is(readErr, io.EOF) {
			return readErr
		}
		if u.counted+int64(n) > u.what.Descriptor.Size {
			return errTooLong(u.what.Descriptor)
		}
		u.reading.Store(false)
		if n > 0 {
			_, err := to.Write(buffer[:n])
			if errors.Is(err, io.ErrClosedPipe) {
				// The registry has answered before it had all of it. Commit returns what it has answered.
				break
			}
			if err != nil {
				return err
			}
			u.moved.Add(int64(n))
			u.count(int64(n))
		}
		if readErr != nil {
			if err := from.Verify(); err != nil {
				return err
			}
			break
		}
	}
	stop := received()
	defer stop()
	return to.Commit(ctx, u.what.Descriptor.Size, u.what.Descriptor.Digest)
}
