package gunzip

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/gzip"

	"github.com/overlay-csi/overlay-csi/pkg/linux/sandbox"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

const helperArgument = "sandbox-helper"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == helperArgument {
		os.Exit(sandbox.Main(os.Args[2:]))
	}
	os.Exit(m.Run())
}

func newDecompressor(t testing.TB) *Decompressor {
	t.Helper()
	needs.Root(t)
	program, err := exec.LookPath("igzip")
	if err != nil {
		t.Skip("igzip is not installed (Debian's isal)")
	}
	d, err := New(Config{Program: program, Helper: []string{"/proc/self/exe", helperArgument}, StallTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func compress(t testing.TB, data []byte) []byte {
	t.Helper()
	var compressed bytes.Buffer
	writer := gzip.NewWriter(&compressed)
	_, err := writer.Write(data)
	if err := errors.Join(err, writer.Close()); err != nil {
		t.Fatal(err)
	}
	return compressed.Bytes()
}

// content returns compressible bytes.
func content(size int) []byte {
	random := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, size)
	for i := range data {
		data[i] = "abcdefgh"[random.IntN(8)]
	}
	return data
}

// withHeader returns a member with another header, or the header alone.
func withHeader(member []byte, flags byte, fields ...byte) []byte {
	header := append([]byte{0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 3}, fields...)
	return slices.Concat(header, member[min(10, len(member)):])
}

func changed(data []byte, at int) []byte {
	data = slices.Clone(data)
	if at < 0 {
		at += len(data)
	}
	data[at] ^= 0x55
	return data
}

// streams are streams of gzip, good and bad.
func streams(t *testing.T) map[string][]byte {
	data := content(3 << 20)
	member := compress(t, data)
	extra := append(binary.LittleEndian.AppendUint16(nil, 65535), make([]byte, 65535)...)
	named := []byte{0x1f, 0x8b, 8, 2 | 8, 0, 0, 0, 0, 0, 3, 'n', 0}
	headerSum := binary.LittleEndian.AppendUint16(nil, uint16(crc32.ChecksumIEEE(named)))
	var many []byte
	for i := range 100 {
		many = append(many, compress(t, bytes.Repeat([]byte{byte(i)}, 20_000))...)
	}
	return map[string][]byte{
		"one member":                  member,
		"two members":                 slices.Concat(member, member),
		"many members":                many,
		"empty members":               slices.Concat(compress(t, nil), member, compress(t, nil)),
		"nothing":                     compress(t, nil),
		"extra field":                 withHeader(member, 4, extra...),
		"name and comment":            withHeader(member, 8|16, []byte("name\x00comment\x00")...),
		"long name":                   withHeader(member, 8, append(bytes.Repeat([]byte("n"), 600), 0)...),
		"header checksum":             withHeader(member, 2|8, slices.Concat([]byte("n\x00"), headerSum)...),
		"bad header checksum":         withHeader(member, 2|8, 'n', 0, 1, 2),
		"reserved flag":               withHeader(member, 0x20),
		"other method":                changed(member, 2),
		"garbage behind":              slices.Concat(member, []byte("garbage")),
		"much garbage behind":         slices.Concat(member, content(4<<20)),
		"zeros behind":                slices.Concat(member, make([]byte, 1024)),
		"one byte of a magic behind":  slices.Concat(member, []byte{0x1f}),
		"a magic behind":              slices.Concat(member, []byte{0x1f, 0x8b}),
		"a header behind":             slices.Concat(member, member[:10]),
		"garbage between":             slices.Concat(member, []byte{0}, member),
		"bad checksum":                changed(member, -6),
		"bad length":                  changed(member, -2),
		"bad checksum of the first":   slices.Concat(changed(member, -6), member),
		"bad data":                    changed(member, len(member)/2),
		"cut in the header":           member[:5],
		"cut in the data":             member[:len(member)/2],
		"cut in the checksum":         member[:len(member)-3],
		"cut in an extra field":       slices.Concat(member, withHeader(nil, 4, 10, 0)),
		"cut in a long extra field":   slices.Concat(member, withHeader(nil, 4, 0xff, 0xff)),
		"cut in fields and a name":    slices.Concat(member, withHeader(nil, 4|8, 0xff, 0xff)),
		"cut in a stored block":       slices.Concat(member, withHeader(nil, 0, 0, 10, 0, 0xf5, 0xff)),
		"cut in the second":           slices.Concat(member, member[:len(member)/2]),
		"block of a reserved type":    slices.Concat(member[:10], []byte{0x07}, member[11:]),
		"member of another algorithm": slices.Concat(member, []byte{0x28, 0xb5, 0x2f, 0xfd}),
	}
}

// TestSameAsGo compares what comes out with Go's decompressor.
func TestSameAsGo(t *testing.T) {
	d := newDecompressor(t)
	var refused int
	for name, stream := range streams(t) {
		t.Run(name, func(t *testing.T) {
			want, wantErr := gunzipInGo(stream)
			reader := d.Gunzip(bufio.NewReaderSize(bytes.NewReader(stream), 128<<10), MinBytes)
			if reader == nil {
				// The header is refused.
				if wantErr == nil || len(want) > 0 {
					t.Errorf("not decompressed, Go's error is %v", wantErr)
				}
				return
			}
			defer reader.Close()
			got, err := io.ReadAll(reader)
			switch {
			case err == nil && wantErr == nil:
				if !bytes.Equal(got, want) {
					t.Errorf("%d bytes differ from %d", len(got), len(want))
				}
			case err == nil:
				t.Errorf("no error, Go's is %v", wantErr)
			case !errors.Is(err, ErrRefused):
				t.Errorf("error %v", err)
			default:
				// Go decides.
				refused++
				t.Logf("refused: %v; Go: %v", err, wantErr)
				if wantErr == nil {
					t.Error("Go takes it")
				}
			}
		})
	}
	if refused == 0 {
		t.Error("nothing was refused")
	}
}

// TestTakesMoreThanGo: what igzip may take although Go does not has the content that its checksum is of (proposal 30).
func TestTakesMoreThanGo(t *testing.T) {
	d := newDecompressor(t)
	member := compress(t, []byte("A"))
	// A block with codes of two bits for A and for its end, and none that begins with 1.
	missing := slices.Concat([]byte{0x05, 0xe0, 0x01, 0x90, 0x24, 0x49, 0x92, 0x24, 0x49, 0x02}, make([]byte, 32),
		[]byte{0x01}, make([]byte, 94), []byte{0x10, 0x20})
	for name, later := range map[string][]byte{
		"long name":     withHeader(member, 8, append(bytes.Repeat([]byte("n"), 600), 0)...),
		"long comment":  withHeader(member, 16, append(bytes.Repeat([]byte("n"), 600), 0)...),
		"reserved flag": withHeader(member, 0x20),
		"missing codes": slices.Concat(member[:10], missing, member[len(member)-8:]),
	} {
		t.Run(name, func(t *testing.T) {
			if content, err := gunzipInGo(slices.Concat(member, later)); err == nil {
				t.Errorf("Go takes it: %q", content)
			}
			reader := d.Gunzip(bufio.NewReaderSize(bytes.NewReader(slices.Concat(member, later)), 128<<10), MinBytes)
			if reader == nil {
				t.Fatal("not decompressed")
			}
			defer reader.Close()
			if got, err := io.ReadAll(reader); !errors.Is(err, ErrRefused) && (err != nil || string(got) != "AA") {
				t.Errorf("%q %v", got, err)
			}
		})
	}
}

func gunzipInGo(stream []byte) ([]byte, error) {
	reader, err := gzip.NewReader(bytes.NewReader(stream))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(reader)
}

// FuzzSameAsGo compares any stream with Go's decompressor.
func FuzzSameAsGo(f *testing.F) {
	member := compress(f, []byte("hello, hello, hello"))
	two, behind := slices.Concat(member, member), slices.Concat(member, []byte("x"))
	for _, seed := range [][]byte{member, two, behind, member[:12], changed(member, 14)} {
		f.Add(seed)
	}
	d := newDecompressor(f)
	f.Fuzz(func(t *testing.T, stream []byte) {
		want, wantErr := gunzipInGo(stream)
		reader := d.Gunzip(bufio.NewReaderSize(bytes.NewReader(stream), 128<<10), MinBytes)
		if reader == nil {
			return
		}
		defer reader.Close()
		got, err := io.ReadAll(reader)
		if err == nil && (wantErr != nil || !bytes.Equal(got, want)) {
			// See TestTakesMoreThanGo.
			var corrupt flate.CorruptInputError
			if errors.Is(wantErr, gzip.ErrHeader) || errors.As(wantErr, &corrupt) {
				t.Skip(wantErr)
			}
			t.Errorf("%d bytes, Go has %d and error %v", len(got), len(want), wantErr)
		}
		if err != nil && !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
	})
}

// TestSourceFails: the error of the source is that of the reader.
func TestSourceFails(t *testing.T) {
	d := newDecompressor(t)
	failure := fmt.Errorf("the download has failed: %w", io.EOF)
	member := compress(t, content(1<<20))
	source := io.MultiReader(bytes.NewReader(member[:len(member)/2]), failing{failure})
	reader := d.Gunzip(bufio.NewReaderSize(source, 1<<10), MinBytes)
	if reader == nil {
		// The first bytes are in the buffer.
		t.Fatal("not decompressed")
	}
	defer reader.Close()
	if _, err := io.ReadAll(reader); !errors.Is(err, failure) {
		t.Errorf("error %v", err)
	}
}

// TestSourceFailsWhileHanging: nobody waits for a process whose stream has failed, such as that of a pull that was given up.
func TestSourceFailsWhileHanging(t *testing.T) {
	needs.Root(t)
	root, err := sandbox.NewRoot("/bin/dash")
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	failure := errors.New("the download has failed")
	reader, err := open(failing{failure}, time.Hour, func(stdin, stdout *os.File) (process, error) {
		return sandbox.Start(root, []string{"/proc/self/exe", helperArgument}, []string{"-c", "while :; do :; done"}, stdin, stdout)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if _, err := io.ReadAll(reader); !errors.Is(err, failure) {
		t.Errorf("error %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// TestSmallIsLeft: a short stream is left to the caller, unread.
func TestSmallIsLeft(t *testing.T) {
	d := newDecompressor(t)
	from := bufio.NewReader(bytes.NewReader(compress(t, []byte("x"))))
	if reader := d.Gunzip(from, MinBytes-1); reader != nil {
		reader.Close()
		t.Error("it was decompressed")
	}
}

// TestClose ends a process in the middle of a stream that does not end.
func TestClose(t *testing.T) {
	d := newDecompressor(t)
	endless := io.MultiReader(bytes.NewReader(compress(t, content(8<<20))), &repeating{compress(t, content(1<<20)), 0})
	reader := d.Gunzip(bufio.NewReaderSize(endless, 128<<10), MinBytes)
	if reader == nil {
		t.Fatal("not decompressed")
	}
	if _, err := io.CopyN(io.Discard, reader, 20<<20); err != nil {
		t.Error(err)
	}
	if err := reader.Close(); err != nil {
		t.Error(err)
	}
}

type repeating struct {
	data   []byte
	offset int
}

func (r *repeating) Read(to []byte) (int, error) {
	n := copy(to, r.data[r.offset:])
	r.offset = (r.offset + n) % len(r.data)
	return n, nil
}

// TestBadDecompressor runs programs that are not igzip, in the sandbox.
func TestBadDecompressor(t *testing.T) {
	needs.Root(t)
	member := compress(t, content(4<<20))
	for _, c := range []struct {
		name, program string
		args          []string
		is            func(error) bool
		want          string
	}{
		{"hangs", "/bin/dash", []string{"-c", "while :; do :; done"}, errdefs.IsUnavailable, "almost nothing"},
		{"copies", "/bin/cat", nil, nil, ""},
		{"ends early", "/bin/dash", []string{"-c", "exit 0"}, isRefused, "before the last byte"},
		{"fails", "/bin/dash", []string{"-c", "exit 3"}, isRefused, "exit status 3"},
		{"ends after some output", "/bin/dash", []string{"-c", "echo lie"}, isRefused, "before the last byte"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, err := sandbox.NewRoot(c.program)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			reader, err := open(bytes.NewReader(member), 200*time.Millisecond, func(stdin, stdout *os.File) (process, error) {
				return sandbox.Start(root, []string{"/proc/self/exe", helperArgument}, c.args, stdin, stdout)
			})
			if err != nil {
				t.Fatal(err)
			}
			defer reader.Close()
			got, err := io.ReadAll(reader)
			if c.is == nil {
				// It has the trailer as it was sent, not what it stands for.
				c.is, c.want = isRefused, "before the last byte"
			}
			if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%d bytes, error %v", len(got), err)
			}
		})
	}
	t.Run("dies", func(t *testing.T) {
		root, err := sandbox.NewRoot("/bin/cat")
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		var started *sandbox.Process
		reader, err := open(&repeating{member, 0}, time.Minute, func(stdin, stdout *os.File) (process, error) {
			started, err = sandbox.Start(root, []string{"/proc/self/exe", helperArgument}, nil, stdin, stdout)
			return started, err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer reader.Close()
		if _, err := io.CopyN(io.Discard, reader, 1<<20); err != nil {
			t.Fatal(err)
		}
		started.Kill()
		if _, err := io.Copy(io.Discard, reader); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "died") {
			t.Errorf("error %v", err)
		}
	})
}

// TestHangsAtItsEnd: a process that has closed its output and does not end is killed.
func TestHangsAtItsEnd(t *testing.T) {
	hanging := &unended{exited: make(chan error, 1)}
	reader, err := open(bytes.NewReader(nil), 10*time.Millisecond, func(_, _ *os.File) (process, error) { return hanging, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if _, err := io.ReadAll(reader); !errdefs.IsUnavailable(err) || !hanging.killed {
		t.Errorf("error %v", err)
	}
}

// unended is a process that ends only when it is killed.
type unended struct {
	exited chan error
	killed bool
}

func (p *unended) Exited() <-chan error { return p.exited }

func (p *unended) Kill() {
	p.killed = true
	p.exited <- errors.New("killed")
}

func isRefused(err error) bool { return errors.Is(err, ErrRefused) }

// TestMissing: a program that is missing, or none at all, is an error of New.
func TestMissing(t *testing.T) {
	needs.Root(t)
	helper := []string{"/proc/self/exe", helperArgument}
	if _, err := New(Config{Program: "/no/such/program", Helper: helper}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
	for _, program := range []string{"/etc/passwd", "/bin/cat", "/bin/true"} {
		if _, err := New(Config{Program: program, Helper: helper, StallTimeout: time.Minute}); err == nil {
			t.Errorf("%s: no error", program)
		}
	}
}

// BenchmarkGunzip compares igzip in its process with Go, both with the digest of the content.
func BenchmarkGunzip(b *testing.B) {
	d := newDecompressor(b)
	for _, megabytes := range []int{1, 4, 16, 256} {
		stream := benchmarkStream(b, megabytes<<20)
		for _, way := range []struct {
			name string
			open func() (io.ReadCloser, error)
		}{
			{"go", func() (io.ReadCloser, error) { return gzip.NewReader(bytes.NewReader(stream)) }},
			{"igzip", func() (io.ReadCloser, error) { return d.start(bytes.NewReader(stream)) }},
		} {
			b.Run(fmt.Sprintf("%s/%dMiB", way.name, len(stream)>>20), func(b *testing.B) {
				b.SetBytes(int64(len(stream)))
				before := cpuTime(b)
				for b.Loop() {
					reader, err := way.open()
					if err != nil {
						b.Fatal(err)
					}
					if _, err := io.Copy(sha256.New(), reader); err != nil {
						b.Fatal(err)
					}
					if err := reader.Close(); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric((cpuTime(b)-before).Seconds()*1000/float64(b.N), "cpu-ms/op")
			})
		}
	}
}

// benchmarkStream returns size bytes of programs of this system or more, compressed.
func benchmarkStream(b *testing.B, size int) []byte {
	b.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		b.Fatal(err)
	}
	var stream []byte
	member := compress(b, self)
	for len(stream) < size {
		stream = append(stream, member...)
	}
	return stream
}
