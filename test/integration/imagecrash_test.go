package integration

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

func contextWithTimeout(t *testing.T, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), timeout)
}

// TestKillsDuringPulls kills the driver 100 times while it pulls and unpacks. What is in the store then is whole.
func TestKillsDuringPulls(t *testing.T) {
	takesMinutes(t)
	node := newNode(t, "--layer-gc-min-age=0s")
	r := startRegistry(t, node, registrytest.Options{})
	want := map[string]string{}
	var layers []v1.Layer
	for i := range 6 {
		var entries []registrytest.Entry
		for j := range 150 {
			entries = append(entries, registrytest.File(fmt.Sprintf("layer-%d/dir-%d/file-%d", i, j%10, j), strings.Repeat(fmt.Sprint(i, j), 3000)))
		}
		layer, err := registrytest.Layer(entries...)
		must(t, err)
		id, err := layer.DiffID()
		must(t, err)
		layers = append(layers, layer)
		want[id.Hex] = ""
	}
	image, err := registrytest.Image(layers...)
	must(t, err)
	pinned := pushAny(t, r, "a:1", image)
	// Slow enough that most kills come while something is under way.
	r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, "") {
			time.Sleep(rand.N(40 * time.Millisecond))
		}
		return false
	})
	start(t, node)
	v := inline("layers", pinned)
	reference := newPod(t, node, "reference")
	publish(t, reference, v)
	for id := range want {
		want[id] = hashTree(t, filepath.Join(node.DataRoot, "layers/sha256", id, "tree"))
	}
	unpublish(t, reference, v)

	var interrupted, partial int
	for round := range 100 {
		pod := newPod(t, node, fmt.Sprint("pod-", round))
		done := make(chan error, 1)
		go func() { _, err := pod.Publish(timeout(t), v); done <- err }()
		time.Sleep(rand.N(400 * time.Millisecond))
		must(t, node.Kill())
		if err := <-done; err != nil {
			interrupted++
		}
		must(t, node.Start(t.Context()))
		names, err := os.ReadDir(filepath.Join(node.DataRoot, "layers/sha256"))
		must(t, err)
		if len(names) > 0 && len(names) < len(want) {
			partial++
		}
		for _, entry := range names {
			if got := hashTree(t, filepath.Join(node.DataRoot, "layers/sha256", entry.Name(), "tree")); got != want[entry.Name()] {
				t.Fatalf("round %d: layer %s is not whole", round, entry.Name())
			}
		}
		if trees, err := filepath.Glob(filepath.Join(node.DataRoot, "layers/incoming/*/tree")); err != nil || len(trees) > 0 {
			t.Fatalf("round %d: half of a layer is left: %v %v", round, trees, err)
		}
		if round%5 == 4 {
			publish(t, pod, v)
			wantFile(t, filepath.Join(pod.Target(v.Name), "layer-5/dir-9/file-149"), strings.Repeat(fmt.Sprint(5, 149), 3000))
		}
		unpublish(t, pod, v)
		if round%3 > 0 {
			if _, err := node.Admin().GC(timeout(t), false, true); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("%d publishes were interrupted, %d times some layers were there and others not", interrupted, partial)
	if interrupted < 30 {
		t.Errorf("only %d publishes were interrupted", interrupted)
	}
	wantNothingLeft(t, node)
}

// hashTree is a digest of all that is in a directory.
func hashTree(t *testing.T, root string) string {
	t.Helper()
	hash := sha256.New()
	must(t, filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(hash, strings.TrimPrefix(path, root), info.Mode())
		if !entry.Type().IsRegular() {
			return nil
		}
		content, err := os.ReadFile(path)
		fmt.Fprintln(hash, info.ModTime().UnixNano())
		hash.Write(content)
		return err
	}))
	return hex.EncodeToString(hash.Sum(nil))
}

// TestCollectUnderLoad has pods come and go for a minute while every layer that is not used is collected all the time. No
// view ever loses a file.
func TestCollectUnderLoad(t *testing.T) {
	takesMinutes(t)
	node := startNode(t, "--layer-gc-min-age=0s")
	r := startRegistry(t, node, registrytest.Options{})
	var images []string
	for i := range 8 {
		images = append(images, pushImage(t, r, fmt.Sprint("image-", i, ":1"), map[string]string{"shared": "shared"}, map[string]string{"own": fmt.Sprint(i)}, map[string]string{"last": "last"}))
	}
	ctx, cancel := contextWithTimeout(t, time.Minute)
	defer cancel()
	var publishes, collected atomic.Int64
	collector := make(chan error, 1)
	go func() {
		for ctx.Err() == nil {
			result, err := node.Admin().GC(t.Context(), false, true)
			if err != nil {
				collector <- err
				return
			}
			collected.Add(int64(len(result.Layers)))
		}
		collector <- nil
	}()
	var workers errgroup.Group
	work := func(worker int) error {
		for round := 0; ctx.Err() == nil; round++ {
			number := rand.IntN(len(images))
			pod, err := node.NewPod(fmt.Sprint("pod-", worker, "-", round))
			if err != nil {
				return err
			}
			v := inline("layers", images[number])
			if err := publishAgain(t, pod, v); err != nil {
				return err
			}
			publishes.Add(1)
			for range 3 {
				for file, want := range map[string]string{"shared": "shared", "own": fmt.Sprint(number), "last": "last"} {
					got, err := os.ReadFile(filepath.Join(pod.Target(v.Name), file))
					if err != nil || string(got) != want {
						return fmt.Errorf("a view lost a file: %q instead of %q: %w", got, want, err)
					}
				}
				time.Sleep(time.Millisecond)
			}
			if err := errors.Join(pod.Unpublish(timeout(t), v), os.RemoveAll(pod.Dir())); err != nil {
				return err
			}
		}
		return nil
	}
	for worker := range 6 {
		workers.Go(func() error { return work(worker) })
	}
	err := workers.Wait()
	cancel()
	must(t, errors.Join(err, <-collector))
	t.Logf("%d publishes, %d layers collected", publishes.Load(), collected.Load())
	if publishes.Load() < 100 || collected.Load() < 100 {
		t.Errorf("only %d publishes and %d layers collected", publishes.Load(), collected.Load())
	}
	wantNothingLeft(t, node)
}

// publishAgain publishes as kubelet does, again where the driver says that it may work later.
func publishAgain(t *testing.T, pod *drivertest.Pod, v drivertest.Volume) error {
	var err error
	for range 100 {
		if _, err = pod.Publish(timeout(t), v); err == nil {
			return nil
		}
		if !strings.Contains(err.Error(), "gone again") {
			return err
		}
	}
	return err
}
