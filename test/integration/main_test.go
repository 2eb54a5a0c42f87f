// Package integration tests the real driver, over its real socket, with real mounts, as kubelet would use it.
package integration

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "overlay-csi-commands-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration tests:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	buildDriver = sync.OnceValues(func() (string, error) { return drivertest.Build(dir) })
	buildOverlayctl = sync.OnceValues(func() (string, error) { return drivertest.BuildCommand(dir, "overlayctl") })
	if os.Getenv("OVERLAY_CSI_TEST_NATIVE") != "" && os.Getenv(besideVariable) == "" {
		if err := printFeatures(dir); err != nil {
			fmt.Fprintln(os.Stderr, "probe the kernel:", err)
			return 1
		}
	}
	if tests := testsBeside(); tests != nil {
		if err := useBinaries(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return runBeside(tests)
	}
	return m.Run()
}

// buildDriver and buildOverlayctl compile a command when the first test needs it, and return its path.
var buildDriver, buildOverlayctl func() (string, error)

func driverBinary(t *testing.T) string {
	t.Helper()
	path, err := buildDriver()
	must(t, err)
	return path
}

func overlayctlBinary(t *testing.T) string {
	t.Helper()
	path, err := buildOverlayctl()
	must(t, err)
	return path
}

// printFeatures prints what this kernel has, and what the driver does in place of what it lacks.
func printFeatures(dir string) error {
	features, err := overlay.Probe(dir)
	if err != nil {
		return err
	}
	fmt.Println("features of this kernel:", features)
	for _, fallback := range features.Fallbacks() {
		fmt.Println("fallback,", fallback)
	}
	return nil
}

// kernels are what the driver is made to believe of the kernel: every way to mount is tested as really as the others.
var kernels = map[string][]string{
	"layers by descriptor": nil,
	"layers by path":       {"--disable-kernel-features=layer-fd"},
	"no detached layers":   {"--disable-kernel-features=detached-layer"},
	"mount(8)":             {"--disable-kernel-features=mount-api,statmount"},
}

// onEachKernel runs a test once for each way to mount. In a virtual machine with a kernel to be tried (test/kernel) there
// is one way, that kernel's own.
func onEachKernel(t *testing.T, test func(t *testing.T, node *drivertest.Node)) {
	if os.Getenv("OVERLAY_CSI_TEST_NATIVE") != "" {
		t.Run("native", func(t *testing.T) { test(t, startNode(t)) })
		return
	}
	for name, args := range kernels {
		t.Run(name, func(t *testing.T) {
			test(t, startNode(t, args...))
		})
	}
}

// newNode makes a node in a directory of its own, whose driver is not started yet. At the end of the test the driver is
// stopped, and what is mounted is unmounted. A driver that logged a panic or a data race fails the test.
func newNode(t *testing.T, args ...string) *drivertest.Node {
	t.Helper()
	return newNodeOf(t, driverBinary(t), args...)
}

// newNodeOf is newNode for another program that runs the driver.
func newNodeOf(t *testing.T, binary string, args ...string) *drivertest.Node {
	t.Helper()
	needs.Root(t)
	dir, remove, err := drivertest.WorkDir()
	if err != nil {
		t.Fatal(err)
	}
	node, err := drivertest.NewNode(dir, binary, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Stop(); err != nil {
			t.Errorf("stop the driver: %v", err)
		}
		if log := node.Log(); strings.Contains(log, "DATA RACE") || strings.Contains(log, "panicked") {
			t.Errorf("the driver's log:\n%s", log)
		} else if t.Failed() {
			t.Logf("the driver's log:\n%s", log)
		}
		if err := remove(); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return node
}

func startNode(t *testing.T, args ...string) *drivertest.Node {
	t.Helper()
	node := newNode(t, args...)
	start(t, node)
	return node
}

func start(t *testing.T, node *drivertest.Node) {
	t.Helper()
	if err := node.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// layersOf makes a layer of files for each map, the topmost first, and returns the value of the key layers.
func layersOf(t *testing.T, node *drivertest.Node, layers ...map[string]string) string {
	t.Helper()
	names := make([]string, len(layers))
	for i, files := range layers {
		names[i] = fmt.Sprintf("layer-%d", i)
		if _, err := node.Layer(names[i], files); err != nil {
			t.Fatal(err)
		}
	}
	return drivertest.Layers(names...)
}

func newPod(t *testing.T, node *drivertest.Node, name string) *drivertest.Pod {
	t.Helper()
	pod, err := node.NewPod(name)
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

func publish(t *testing.T, pod *drivertest.Pod, v drivertest.Volume) string {
	t.Helper()
	target, err := pod.Publish(timeout(t), v)
	if err != nil {
		t.Fatalf("publish: %v", err)
	}
	return target
}

func unpublish(t *testing.T, pod *drivertest.Pod, v drivertest.Volume) {
	t.Helper()
	if err := pod.Unpublish(timeout(t), v); err != nil {
		t.Fatalf("unpublish: %v", err)
	}
}

func removePod(t *testing.T, pod *drivertest.Pod) {
	t.Helper()
	if err := pod.Remove(); err != nil {
		t.Fatalf("remove the pod's directory: %v", err)
	}
}

// takesMinutes skips a test of much load where only a short run is asked for, as in the virtual machine that CI boots.
func takesMinutes(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("it takes minutes (-test.short)")
	}
}

// proof is how often a test of much load does what it does: with OVERLAY_CSI_PROOF=1, as make proof sets it, so often that
// rare faults are met.
func proof(short, long int) int {
	if os.Getenv("OVERLAY_CSI_PROOF") == "1" {
		return long
	}
	return short
}

// timeout is kubelet's patience, two minutes.
func timeout(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func wantNothingLeft(t *testing.T, node *drivertest.Node) {
	t.Helper()
	left, err := node.Leftovers()
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// wantCode checks an RPC's code, and that its message has each of the words.
func wantCode(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Fatalf("code %s instead of %s: %v", status.Code(err), code, err)
	}
	for _, word := range words {
		if !strings.Contains(status.Convert(err).Message(), word) {
			t.Errorf("the message %q does not say %q", status.Convert(err).Message(), word)
		}
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func wantFile(t *testing.T, path, want string) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	} else if string(got) != want {
		t.Errorf("%s has %q instead of %q", path, got, want)
	}
}

func wantAbsent(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is there (%v)", path, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits for something that the driver does in the background.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	const patience = 2 * time.Minute
	deadline := time.Now().Add(patience)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatalf("not after %s: %s", patience, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func upperDir(node *drivertest.Node, pod *drivertest.Pod, v drivertest.Volume) string {
	base := filepath.Join(node.DataRoot, "volumes", pod.Request(v).GetVolumeId())
	if _, err := os.Lstat(filepath.Join(base, "data")); err == nil {
		// Where the data root has project quotas.
		base = filepath.Join(base, "data")
	}
	return filepath.Join(base, "upper")
}
