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
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

func contextWithTimeout(t *testing.T, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), timeout)
}

// TestKillsDuringPulls kills the driver while it pulls and unpacks. What is in the store then is whole. The registry holds a
// blob back until the kill has come, so that no disk is too fast for it.
func TestKillsDuringPulls(t *testing.T) {
	takesMinutes(t)
	node := newNode(t, "--layer-gc-min-age=0s")
	r := startRegistry(t, node, registrytest.Options{})
	layers, want := pulledLayers(t)
	image, err := registrytest.Image(layers...)
	must(t, err)
	v := inline("layers", pushAny(t, r, "a:1", image))
	start(t, node)
	reference := newPod(t, node, "reference")
	began := time.Now()
	publish(t, reference, v)
	whole := time.Since(began)
	for id := range want {
		want[id] = hashTree(t, filepath.Join(node.DataRoot, "layers/sha256", id, "tree"))
	}
	unpublish(t, reference, v)

	ctx, cancel := contextWithTimeout(t, crashDeadline)
	defer cancel()
	var interrupted, partial, rounds int
	for ; interrupted < proof(12, 60) || partial < proof(4, 20); rounds++ {
		if ctx.Err() != nil {
			t.Fatalf("after %s, %d publishes were interrupted, and %d times some layers were there and others not", crashDeadline, interrupted,
				partial)
		}
		if len(storedLayers(t, node)) == len(want) || rounds%3 > 0 {
			_, err := node.Admin().GC(timeout(t), false, true)
			must(t, err)
		}
		pod := newPod(t, node, fmt.Sprint("pod-", rounds))
		done := make(chan error, 1)
		held := holdBlob(r, rounds%3, layers)
		go func() { _, err := pod.Publish(timeout(t), v); done <- err }()
		var published error
		var ended bool
		select {
		case <-held:
		case published = <-done:
			// The blob that is held had come before the last kill, all of it.
			ended = true
		}
		switch rounds % 3 {
		case 0:
			// Nothing is held: at any moment, the end of a pull among them.
			time.Sleep(rand.N(whole))
		case 1:
			// In the middle of a blob: what has come of it is unpacked, or not yet.
			time.Sleep(rand.N(10 * time.Millisecond))
		case 2:
			// Without one layer, and with others.
			eventually(t, "a layer is there", func() bool { return len(storedLayers(t, node)) > 0 })
		}
		must(t, node.Kill())
		if !ended {
			published = <-done
		}
		if published != nil {
			interrupted++
		}
		r.SetFault(nil)
		must(t, node.Start(t.Context()))
		stored := storedLayers(t, node)
		if len(stored) > 0 && len(stored) < len(want) {
			partial++
		}
		for _, id := range stored {
			if got := hashTree(t, filepath.Join(node.DataRoot, "layers/sha256", id, "tree")); got != want[id] {
				t.Fatalf("round %d: layer %s is not whole", rounds, id)
			}
		}
		if trees, err := filepath.Glob(filepath.Join(node.DataRoot, "layers/incoming/*/tree")); err != nil || len(trees) > 0 {
			t.Fatalf("round %d: half of a layer is left: %v %v", rounds, trees, err)
		}
		if rounds%5 == 4 {
			publish(t, pod, v)
			wantFile(t, filepath.Join(pod.Target(v.Name), "layer-5/dir-9/file-149"), strings.Repeat(fmt.Sprint(5, 149), 3000))
		}
		unpublish(t, pod, v)
	}
	t.Logf("%d kills interrupted %d publishes; %d times some layers were there and others not", rounds, interrupted, partial)
	wantNothingLeft(t, node)
}

// pulledLayers are layers of 150 files each, and the IDs under which they are stored.
func pulledLayers(t *testing.T) (layers []v1.Layer, ids map[string]string) {
	t.Helper()
	ids = map[string]string{}
	for i := range 6 {
		var entries []registrytest.Entry
		for j := range 150 {
			entries = append(entries, registrytest.File(fmt.Sprintf("layer-%d/dir-%d/file-%d", i, j%10, j), strings.Repeat(fmt.Sprint(i, j), 3000)))
		}
		layer, err := registrytest.Layer(entries...)
		must(t, err)
		id, err := layer.DiffID()
		must(t, err)
		layers, ids[id.Hex] = append(layers, layer), ""
	}
	return layers, ids
}

// holdBlob has the registry hold back one layer: nothing of it where how is 2, all but a part where it is 1, and no layer
// where it is 0. The channel is closed when the driver waits for what is held.
func holdBlob(r *registrytest.Registry, how int, layers []v1.Layer) <-chan struct{} {
	held := make(chan struct{})
	if how == 0 {
		close(held)
		return held
	}
	layer := layers[rand.IntN(len(layers))]
	digest, err := layer.Digest()
	if err != nil {
		panic(err)
	}
	size, err := layer.Size()
	if err != nil {
		panic(err)
	}
	after := 0
	if how == 1 {
		after = rand.IntN(int(size))
	}
	var once sync.Once
	r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
		if !registrytest.IsBlob(request, digest.Hex) {
			return false
		}
		w.(*registrytest.ResponseWriter).StopAfter(after, func() {
			once.Do(func() { close(held) })
			<-request.Context().Done()
		})
		return false
	})
	return held
}

// storedLayers are the IDs of the layers that the node has.
func storedLayers(t *testing.T, node *drivertest.Node) (ids []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(node.DataRoot, "layers/sha256"))
	must(t, err)
	for _, entry := range entries {
		ids = append(ids, entry.Name())
	}
	return ids
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

// TestCollectUnderLoad has pods come and go while every layer that is not used is collected all the time. No view ever loses
// a file.
func TestCollectUnderLoad(t *testing.T) {
	takesMinutes(t)
	node := startNode(t, "--layer-gc-min-age=0s")
	r := startRegistry(t, node, registrytest.Options{})
	var images []string
	for i := range 8 {
		images = append(images, pushImage(t, r, fmt.Sprint("image-", i, ":1"), map[string]string{"shared": "shared"},
			map[string]string{"own": fmt.Sprint(i)}, map[string]string{"last": "last"}))
	}
	ctx, cancel := contextWithTimeout(t, crashDeadline)
	defer cancel()
	var publishes, collected atomic.Int64
	enough := func() bool {
		return publishes.Load() >= int64(proof(100, 3000)) && collected.Load() >= int64(proof(100, 3000))
	}
	var workers errgroup.Group
	stop := make(chan struct{})
	collector := make(chan error, 1)
	go func() { collector <- collectUntil(t, node, stop, &collected) }()
	for worker := range 6 {
		workers.Go(func() error {
			for round := 0; !enough(); round++ {
				if err := readWhileCollected(ctx, node, fmt.Sprint("pod-", worker, "-", round), images); err != nil {
					return fmt.Errorf("after %d publishes, with %d layers collected: %w", publishes.Load(), collected.Load(), err)
				}
				publishes.Add(1)
			}
			return nil
		})
	}
	err := workers.Wait()
	close(stop)
	must(t, errors.Join(err, <-collector))
	t.Logf("%d publishes, %d layers collected", publishes.Load(), collected.Load())
	wantNothingLeft(t, node)
}

// collectUntil collects every layer that is not used until stop is closed.
func collectUntil(t *testing.T, node *drivertest.Node, stop <-chan struct{}, collected *atomic.Int64) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		result, err := node.Admin().GC(t.Context(), false, true)
		if err != nil {
			return err
		}
		collected.Add(int64(len(result.Layers)))
	}
}

// readWhileCollected publishes one of the images for a new pod, reads its files several times, and unpublishes it.
func readWhileCollected(ctx context.Context, node *drivertest.Node, name string, images []string) error {
	number := rand.IntN(len(images))
	pod, err := node.NewPod(name)
	if err != nil {
		return err
	}
	v := inline("layers", images[number])
	if err := publishAgain(ctx, pod, v); err != nil {
		return err
	}
	for range 3 {
		for file, want := range map[string]string{"shared": "shared", "own": fmt.Sprint(number), "last": "last"} {
			got, err := os.ReadFile(filepath.Join(pod.Target(v.Name), file))
			if err != nil || string(got) != want {
				return fmt.Errorf("a view lost a file: %q instead of %q: %w", got, want, err)
			}
		}
		time.Sleep(time.Millisecond)
	}
	return errors.Join(pod.Unpublish(ctx, v), os.RemoveAll(pod.Dir()))
}

// publishAgain publishes as kubelet does, again where the driver says that it may work later.
func publishAgain(ctx context.Context, pod *drivertest.Pod, v drivertest.Volume) error {
	for {
		_, err := pod.Publish(ctx, v)
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return err
		}
	}
}
