package registry

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

func newRepository(t *testing.T, host string) *Repository {
	t.Helper()
	named, err := ParseName(host + "/team/data:1")
	must(t, err)
	client := NewClient(Config{StallTimeout: 10 * time.Second, Backoff: time.Second})
	return client.Repository(named, Credentials{})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestTokenServerSendsWithoutEnd: containerd reads the answer of a token server whole.
func TestTokenServerSendsWithoutEnd(t *testing.T) {
	const sent = 64 << 20
	server := httptest.NewServer(nil)
	defer server.Close()
	server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/token" {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="x"`, server.URL))
			http.Error(w, "", http.StatusUnauthorized)
			return
		}
		_, _ = io.WriteString(w, `{"token":"`)
		_, _ = io.CopyN(w, endless('x'), sent)
		_, _ = io.WriteString(w, `"}`)
	})
	repository := newRepository(t, strings.TrimPrefix(server.URL, "http://"))
	descriptor := ocispec.Descriptor{Digest: digest.FromString("x"), Size: 342, MediaType: ocispec.MediaTypeImageConfig}
	for name, ask := range map[string]func() error{
		"tag": func() error {
			_, err := repository.Resolve(t.Context())
			return err
		},
		"document": func() error {
			_, err := repository.Fetch(t.Context(), descriptor)
			return err
		},
		"layer": func() error {
			spool, err := OpenSpool(filepath.Join(t.TempDir(), "blob"))
			must(t, err)
			defer spool.Close()
			return repository.Download(t.Context(), descriptor, spool, &Progress{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err := ask()
			runtime.ReadMemStats(&after)
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(fmt.Sprint(err), "token server's answer has more than") {
				t.Errorf("the error is %v", err)
			}
			if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 16<<20 {
				t.Errorf("%d bytes were allocated for an answer of %d", allocated, sent)
			}
		})
	}
}

// TestContentEncodingTakesNoMemory: containerd decompresses what a registry compresses for the transport, with windows of up to 512 MiB.
func TestContentEncodingTakesNoMemory(t *testing.T) {
	const size = 128 << 20
	for name, c := range map[string]struct {
		encode func(t *testing.T, w io.Writer) io.WriteCloser
		want   error
		// message is part of the error.
		message string
	}{
		"identity": {},
		"gzip":     {encode: func(_ *testing.T, w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }},
		"zstd": {encode: func(t *testing.T, w io.Writer) io.WriteCloser {
			writer, err := zstd.NewWriter(w, zstd.WithWindowSize(zstd.MaxWindowSize), zstd.WithEncoderConcurrency(1))
			must(t, err)
			return writer
		}, want: errdefs.ErrFailedPrecondition, message: "content encoding zstd"},
	} {
		t.Run(name, func(t *testing.T) {
			var body bytes.Buffer
			if c.encode == nil {
				_, _ = io.CopyN(&body, endless(0), size)
			} else {
				writer := c.encode(t, &body)
				_, err := io.CopyN(writer, endless(0), size)
				must(t, errors.Join(err, writer.Close()))
			}
			var accepted atomic.Value
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				accepted.Store(r.Header.Get("Accept-Encoding"))
				if c.encode != nil {
					w.Header().Set("Content-Encoding", name)
				}
				_, _ = w.Write(body.Bytes())
			}))
			defer server.Close()
			descriptor := ocispec.Descriptor{Digest: digest.FromString("x"), Size: size, MediaType: ocispec.MediaTypeImageLayer}
			repository := newRepository(t, strings.TrimPrefix(server.URL, "http://"))
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			read, err := readBlob(t.Context(), repository, descriptor)
			runtime.ReadMemStats(&after)
			if !errors.Is(err, c.want) || err == nil && read != size || !strings.Contains(fmt.Sprint(err), c.message) {
				t.Errorf("%d bytes, the error is %v", read, err)
			}
			if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 16<<20 {
				t.Errorf("%d bytes were allocated for %d", allocated, body.Len())
			}
			if accepted.Load() != "identity" {
				t.Errorf("the request accepts %q", accepted.Load())
			}
		})
	}
}

func readBlob(ctx context.Context, repository *Repository, descriptor ocispec.Descriptor) (int64, error) {
	body, err := repository.openBlob(ctx, descriptor, 0)
	if err != nil {
		return 0, repository.wrap("fetch", err)
	}
	defer body.Close()
	read, err := io.Copy(io.Discard, body)
	return read, repository.wrap("fetch", err)
}

type endless byte

func (e endless) Read(buffer []byte) (int, error) {
	for i := range buffer {
		buffer[i] = byte(e)
	}
	return len(buffer), nil
}

// TestErrorsAreBounded also checks that no signature of a presigned URL gets into an error.
func TestErrorsAreBounded(t *testing.T) {
	const signature = "X-Amz-Signature=0123abcd"
	for name, handler := range map[string]http.HandlerFunc{
		"presigned URL": func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/signed" {
				http.Redirect(w, r, "/signed?a=b:c&"+signature, http.StatusTemporaryRedirect)
				return
			}
			http.Error(w, "", http.StatusForbidden)
		},
		"presigned URL that cannot be reached": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/signed?"+signature, http.StatusTemporaryRedirect)
		},
		"long URL": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/"+strings.Repeat("x", 1<<17), http.StatusTemporaryRedirect)
		},
		"escape sequences": func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, `{"errors":[{"code":"DENIED","message":"\u001b[2J`+strings.Repeat("y", 60_000)+`"}]}`, http.StatusForbidden)
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(handler)
			defer server.Close()
			descriptor := ocispec.Descriptor{Digest: digest.FromString("x"), Size: 1, MediaType: ocispec.MediaTypeImageLayer}
			_, err := newRepository(t, strings.TrimPrefix(server.URL, "http://")).Fetch(t.Context(), descriptor)
			var registryError *Error
			if !errors.As(err, &registryError) {
				t.Fatalf("no error of a registry: %v", err)
			}
			text := err.Error()
			if len(text) > 4096 || strings.Contains(text, "0123abcd") || strings.ContainsAny(text, "\x1b\n") {
				t.Errorf("%d bytes: %.2000q", len(text), text)
			}
			if !strings.Contains(text, "team/data") {
				t.Errorf("the error does not name the image: %q", text)
			}
		})
	}
}

// TestErrorKind checks what errors.Is finds in the error of a registry, and that wrapping it again changes nothing.
func TestErrorKind(t *testing.T) {
	repository := newRepository(t, "registry.example")
	for name, c := range map[string]struct {
		err  error
		want error
	}{
		"mismatch":      {fmt.Errorf("%w: x", image.ErrContentMismatch), image.ErrContentMismatch},
		"cancelled":     {fmt.Errorf("x: %w", context.Canceled), context.Canceled},
		"not found":     {fmt.Errorf("%w: x", errdefs.ErrNotFound), errdefs.ErrNotFound},
		"configuration": {fmt.Errorf("%w: x", errdefs.ErrInvalidArgument), errdefs.ErrFailedPrecondition},
		"anything else": {io.ErrUnexpectedEOF, errdefs.ErrUnavailable},
		"stall":         {errStalled, errdefs.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			err := repository.wrap("fetch", c.err)
			if !errors.Is(err, c.want) || repository.wrap("unpack", fmt.Errorf("y: %w", err)).Error() != "y: "+err.Error() {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

// TestFirstLoggedError: containerd logs what is wrong with a hosts.toml instead of returning it.
func TestFirstLoggedError(t *testing.T) {
	hook := &firstLoggedError{}
	logger := discardLogger(hook)
	log.G(log.WithLogger(t.Context(), logger)).Info("not an error")
	logger.WithError(errors.New("bad file")).Error("first")
	logger.WithError(errors.New("other")).Error("second")
	if hook.message != "first: bad file" {
		t.Errorf("it is %q", hook.message)
	}
}

// newDownload is a download of a blob that open opens.
func newDownload(t *testing.T, size int64, open func(ctx context.Context, offset int64) (io.ReadCloser, error)) *download {
	t.Helper()
	spool, err := OpenSpool(filepath.Join(t.TempDir(), "blob"))
	must(t, err)
	t.Cleanup(func() { spool.Close() })
	descriptor := ocispec.Descriptor{Digest: digest.FromString("x"), Size: size}
	return &download{
		repository: newRepository(t, "registry.example"), descriptor: descriptor, open: open, into: spool, progress: &Progress{},
	}
}

// TestBackoff: the pause after a failure doubles, and begins again once something has come.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var at []time.Duration
		began := time.Now()
		d := newDownload(t, 2, func(context.Context, int64) (io.ReadCloser, error) {
			at = append(at, time.Since(began))
			if len(at) == 4 {
				return io.NopCloser(strings.NewReader("x")), nil
			}
			return nil, errors.New("down")
		})
		err := d.run(t.Context())
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "tried 5 times") {
			t.Errorf("the error is %v", err)
		}
		// Three failures, one try that brings a byte and counts as the first failure of five.
		want := []time.Duration{0, 1, 2, 4, 1, 2, 4, 8}
		if len(at) != len(want) {
			t.Fatalf("%d requests: %v", len(at), at)
		}
		for i := 1; i < len(at); i++ {
			pause, least := at[i]-at[i-1], want[i]*time.Second
			if pause < least || pause > least+least/4 {
				t.Errorf("the pause before request %d was %s instead of %s and up to a quarter more", i, pause, least)
			}
		}
	})
}

// TestStall: a request during which next to nothing comes is ended after the stall timeout, whatever it is waiting for.
func TestStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		requests := 0
		d := newDownload(t, 1<<20, func(ctx context.Context, _ int64) (io.ReadCloser, error) {
			requests++
			<-ctx.Done()
			return nil, ctx.Err()
		})
		began := time.Now()
		err := d.run(t.Context())
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), errStalled.Error()) {
			t.Errorf("the error is %v", err)
		}
		if took := time.Since(began); requests != maxFailures || took < 5*10*time.Second || took > 80*time.Second {
			t.Errorf("%d requests took %s", requests, took)
		}
	})
}

// trickle is a body that sends rate bytes a second.
type trickle struct {
	ctx  context.Context
	rate int
}

func (b trickle) Read(buffer []byte) (int, error) {
	select {
	case <-b.ctx.Done():
		return 0, b.ctx.Err()
	case <-time.After(time.Second):
		return min(b.rate, len(buffer)), nil
	}
}

// TestSlowDownload: a registry that sends, but next to nothing, does not hold a download for ever.
func TestSlowDownload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDownload(t, 8<<20, func(ctx context.Context, _ int64) (io.ReadCloser, error) {
			return io.NopCloser(trickle{ctx, 2 << 10}), nil
		})
		began := time.Now()
		err := d.run(t.Context())
		if !errdefs.IsUnavailable(err) || !strings.Contains(fmt.Sprint(err), "16 KiB/s") {
			t.Errorf("the error is %v", err)
		}
		if took := time.Since(began); took < slowPeriod || took > slowPeriod+time.Minute {
			t.Errorf("the download took %s", took)
		}
		if d.into.Len() == 0 {
			t.Error("nothing is kept of the download")
		}
	})
}

// TestRangesAreIgnored: a registry without ranges sends what is in the spool again, and that takes longer than the stall timeout.
func TestRangesAreIgnored(t *testing.T) {
	const chunk, chunks = 4 << 10, 40
	blob := []byte(strings.Repeat("0123456789abcdef", chunk*chunks/16))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		for at := 0; at < len(blob) && r.Context().Err() == nil; at += chunk {
			_, _ = w.Write(blob[at : at+chunk])
			_ = http.NewResponseController(w).Flush()
			time.Sleep(50 * time.Millisecond)
		}
	}))
	defer server.Close()
	named, err := ParseName(strings.TrimPrefix(server.URL, "http://") + "/team/data:1")
	must(t, err)
	client := NewClient(Config{StallTimeout: 500 * time.Millisecond, Backoff: time.Millisecond})
	path := filepath.Join(t.TempDir(), "blob")
	must(t, os.WriteFile(path, blob[:len(blob)-chunk], 0o600))
	spool, err := OpenSpool(path)
	must(t, err)
	defer spool.Close()
	descriptor := ocispec.Descriptor{Digest: digest.FromBytes(blob), Size: int64(len(blob)), MediaType: ocispec.MediaTypeImageLayer}
	var progress Progress
	must(t, client.Repository(named, Credentials{}).Download(t.Context(), descriptor, spool, &progress))
	content, err := os.ReadFile(path)
	if err != nil || string(content) != string(blob) || progress.Received.Load() != descriptor.Size || !progress.IgnoresRanges.Load() {
		t.Errorf("%d bytes, ranges are ignored: %t, %v", len(content), progress.IgnoresRanges.Load(), err)
	}
}

// TestRepeatedWithoutEnd: what a registry sends again counts for a slow download, but not for ever.
func TestRepeatedWithoutEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate = 64 << 10
		var counted *repeated
		d := newDownload(t, 8<<20, func(ctx context.Context, _ int64) (io.ReadCloser, error) {
			counted, _ = ctx.Value(repeatedKey{}).(*repeated)
			for ctx.Err() == nil {
				time.Sleep(time.Second)
				counted.add(rate)
			}
			return nil, ctx.Err()
		})
		began := time.Now()
		err := d.run(t.Context())
		if !errdefs.IsUnavailable(err) || !strings.Contains(fmt.Sprint(err), errStalled.Error()) {
			t.Errorf("the error is %v", err)
		}
		most := maxFailures*8<<20/rate*time.Second + slowPeriod*2
		if took := time.Since(began); took < slowPeriod || took > most {
			t.Errorf("the download took %s", took)
		}
	})
}

// TestRepeatedByWholes: a registry that refuses ranges sends half of the blob and then, each time, that and one more byte. Such a download
// is too slow.
func TestRepeatedByWholes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, rate = 1 << 20, 64 << 10
		var d *download
		d = newDownload(t, size, func(_ context.Context, offset int64) (io.ReadCloser, error) {
			if offset > 0 {
				err := remoteerrors.ErrUnexpectedStatus{StatusCode: http.StatusRequestedRangeNotSatisfiable}
				return io.NopCloser(iotest.ErrReader(err)), nil
			}
			whole := io.MultiReader(io.LimitReader(endless(0), max(size/2, d.into.Len()+1)), iotest.ErrReader(io.ErrUnexpectedEOF))
			return io.NopCloser(throttled{whole, rate}), nil
		})
		began := time.Now()
		err := d.run(t.Context())
		most := maxFailures*size/rate*time.Second + slowPeriod*2
		if took := time.Since(began); !errdefs.IsUnavailable(err) || took > most {
			t.Errorf("the download took %s, of %s: %v", took, most, err)
		}
	})
}

// throttled gives a number of bytes a second.
type throttled struct {
	io.Reader
	rate int
}

func (r throttled) Read(buffer []byte) (int, error) {
	n, err := r.Reader.Read(buffer[:min(len(buffer), r.rate/10)])
	time.Sleep(time.Duration(n) * time.Second / time.Duration(r.rate))
	return n, err
}

// TestSpool reads what an earlier download left, what comes, and why it ended.
func TestSpool(t *testing.T) {
	path := filepath.Join(t.TempDir(), "blob")
	must(t, os.WriteFile(path, []byte("old "), 0o600))
	spool, err := OpenSpool(path)
	must(t, err)
	defer spool.Close()
	reason := errors.New("gone")
	go func() {
		_, _ = io.WriteString(spool, "new")
		spool.Finish(reason)
	}()
	content, err := io.ReadAll(spool.Reader())
	if string(content) != "old new" || !errors.Is(err, reason) || spool.Len() != 7 {
		t.Errorf("%q, %v", content, err)
	}
}
