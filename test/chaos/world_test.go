package chaos

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// diskSize is the size in bytes of the disk of the data root.
const diskSize = 512 << 20

// maxMemory is the bound in bytes on what the driver has resident.
const maxMemory = 256 << 20

// world is a node, and what the model knows of it.
type world struct {
	t        *testing.T
	random   *rand.Rand
	node     *drivertest.Node
	registry *registrytest.Registry
	total    *tally

	// fileSystem is that of the data root.
	fileSystem string
	// fault is what is wrong with the node at the moment.
	fault fault
	// sources are the layers that volumes can have, and what they show.
	sources   []source
	claims    []*claim
	snapshots []*snapshot
	caches    map[string]*cache
	pods      []*pod
	// phases has how pods ended.
	phases *drivertest.PodPhases
	// boots counts the boots of the node.
	boots int
	// hasStarted is set where pods wait for their views, because the node was started again.
	hasStarted bool
	// next numbers the names that the walk gives.
	next int
	// story is what was done.
	story []string
}

// source is a value of the key layers.
type source struct {
	layers string
	files  tree
	// secrets are those that the registry wants.
	secrets map[string]string
}

// newWorld makes a node with a driver. The data root is on a file system of its own.
func newWorld(t *testing.T, binary string, seed uint64, total *tally) *world {
	t.Helper()
	dir, remove, err := drivertest.WorkDir()
	must(t, err)
	node, err := drivertest.NewNode(dir, binary, "--reconcile-interval=200ms", "--pod-volume-wait=1s", "--layer-gc-min-age=0")
	must(t, err)
	w := &world{t: t, random: rand.New(rand.NewPCG(seed, 0)), node: node, total: total, caches: map[string]*cache{}}
	w.phases = drivertest.NewPodPhases()
	t.Cleanup(w.phases.Close)
	kubeconfig, err := w.phases.Kubeconfig(dir)
	must(t, err)
	node.AddArgs("--kubeconfig=" + kubeconfig)
	w.fileSystem = pick(w, fewInodes, "xfs", "btrfs", "ext4 with project quota", "xfs with project quota", "btrfs with quota")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("on %s:\n%s\nthe driver's log:\n%s", w.fileSystem, strings.Join(w.story, "\n"), node.Log())
		}
		if err := node.Kill(); err != nil {
			t.Error(err)
		}
		if err := remove(); err != nil {
			t.Error(err)
		}
	})
	must(t, os.Mkdir(node.DataRoot, 0o755))
	w.makeDisk()
	w.registry, err = registrytest.Start(registrytest.Options{TLS: true, User: "tenant", Password: "secret", Private: private})
	must(t, err)
	t.Cleanup(w.registry.Close)
	must(t, w.registry.Configure(node.CertsDir()))
	must(t, os.MkdirAll(w.canary(), 0o755))
	must(t, os.WriteFile(filepath.Join(w.canary(), "key"), []byte("untouched"), 0o600))
	w.makeSources()
	must(t, node.Start(t.Context()))
	return w
}

// makeDisk makes the disk of the data root, without quotas where the kernel has none on its file system.
func (w *world) makeDisk() {
	w.t.Helper()
	format := func() error {
		must(w.t, drivertest.MakeImage(w.fileSystem, w.image(), diskSize, ""))
		return drivertest.MountImage(w.fileSystem, w.image(), w.node.DataRoot)
	}
	err := format()
	if plain, _, hasQuota := strings.Cut(w.fileSystem, " "); err != nil && hasQuota {
		w.fileSystem = plain
		err = format()
	}
	must(w.t, err)
}

// isOnBtrfs reports whether the data root is on btrfs, which cannot be shut down before Linux 6.19.
func (w *world) isOnBtrfs() bool { return strings.HasPrefix(w.fileSystem, "btrfs") }

// image is the disk of the data root.
func (w *world) image() string { return w.node.DataRoot + ".img" }

// canary is a directory of the node that no volume has to do with.
func (w *world) canary() string { return filepath.Join(w.node.KubeletDir, "pki") }

// makeSources makes layers in a layer root, and images that share a layer.
func (w *world) makeSources() {
	w.t.Helper()
	lower := tree{"base": "lower", "dir/base": "lower", "dir/lower": "lower"}
	upper := tree{"base": "upper", "dir/upper": "upper"}
	secret := tree{"secret": "of the tenant"}
	both := tree{"base": "upper", "dir/base": "lower", "dir/lower": "lower", "dir/upper": "upper"}
	for name, files := range map[string]tree{"lower": lower, "upper": upper} {
		_, err := w.node.Layer(name, files)
		must(w.t, err)
	}
	w.makeArchive("both.tar", both)
	w.sources = []source{
		{drivertest.Layers("upper", "lower"), both, nil},
		{drivertest.Layers("lower"), lower, nil},
		{"oci://" + w.push("one:1", lower), lower, nil},
		{"archive://" + drivertest.LayerRoot + "/both.tar", both, nil},
		{"oci://" + w.push("two:1", lower, upper), both, nil},
		{"oci://" + w.push(private+"image:1", lower, secret), merge(lower, secret), w.login("secret")},
	}
}

// makeArchive makes a tar of files in the layer root.
func (w *world) makeArchive(name string, files tree) {
	w.t.Helper()
	var content bytes.Buffer
	archive := tar.NewWriter(&content)
	for _, file := range slices.Sorted(maps.Keys(files)) {
		must(w.t, archive.WriteHeader(&tar.Header{Name: file, Mode: 0o644, Size: int64(len(files[file]))}))
		_, err := archive.Write([]byte(files[file]))
		must(w.t, err)
	}
	must(w.t, archive.Close())
	must(w.t, os.WriteFile(filepath.Join(w.node.LayerDir, name), content.Bytes(), 0o644))
}

func (w *world) push(name string, layers ...tree) string {
	w.t.Helper()
	image, err := registrytest.ImageOf(layers...)
	must(w.t, err)
	pushed, err := w.registry.Push(w.t.Context(), name, image)
	must(w.t, err)
	return pushed
}

// name returns a new name.
func (w *world) name(kind string) string {
	w.next++
	return fmt.Sprint(kind, "-", w.next)
}

// tell adds to the story.
func (w *world) tell(format string, args ...any) {
	w.story = append(w.story, fmt.Sprintf(format, args...))
}

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("step %d, %s: %s", len(w.story), w.story[len(w.story)-1], fmt.Sprintf(format, args...))
}

// oneIn reports true once in n times.
func (w *world) oneIn(n int) bool { return w.random.IntN(n) == 0 }

func pick[T any](w *world, from ...T) T { return from[w.random.IntN(len(from))] }

// noteMemory remembers the peak of the driver's memory.
func (w *world) noteMemory() {
	w.t.Helper()
	peak, err := w.node.PeakMemory()
	must(w.t, err)
	w.total.peak = max(w.total.peak, peak)
	if peak > maxMemory {
		w.fatalf("the driver had %d MiB resident", peak>>20)
	}
}

// fewInodes is a file system that takes no time to be filled with files.
const fewInodes = "ext4 with few inodes"

// fault is what is wrong with a node.
type fault string

const (
	noFault      fault = ""
	fullDisk     fault = "full disk"
	noInodes     fault = "no inodes"
	readOnlyDisk fault = "read-only disk"
	failedDisk   fault = "failed disk"
	// A registry is out of order, cuts its answers, or sends other content than it has announced.
	absentRegistry  fault = "absent registry"
	cuttingRegistry fault = "cutting registry"
	lyingRegistry   fault = "lying registry"
)

// registryFaults are how a registry misbehaves.
var registryFaults = map[fault]registrytest.Fault{
	absentRegistry: func(answer http.ResponseWriter, _ *http.Request) bool {
		http.Error(answer, "out of order", http.StatusServiceUnavailable)
		return true
	},
	cuttingRegistry: func(answer http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, "") {
			answer.(*registrytest.ResponseWriter).CutAfter(20)
		}
		return false
	},
	lyingRegistry: func(answer http.ResponseWriter, request *http.Request) bool {
		if !registrytest.IsBlob(request, "") {
			return false
		}
		_, _ = answer.Write([]byte(strings.Repeat("not the blob ", 1000)))
		return true
	},
}

// breakSomething begins a fault.
func (w *world) breakSomething() {
	kind := pick(w, fullDisk, readOnlyDisk, failedDisk, absentRegistry)
	switch {
	case kind == absentRegistry:
		kind = pick(w, absentRegistry, cuttingRegistry, lyingRegistry)
	case kind == failedDisk && w.isOnBtrfs():
		kind = fullDisk
	case kind == fullDisk && w.fileSystem == fewInodes && w.oneIn(2):
		kind = noInodes
	}
	w.tell("fault: %s", kind)
	switch kind {
	case noFault:
	case fullDisk:
		must(w.t, drivertest.FillUp(w.filler()))
	case noInodes:
		w.takeInodes()
	case readOnlyDisk:
		if err := unix.Mount("", w.node.DataRoot, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err == unix.EBUSY {
			return // Something is being written.
		} else if err != nil {
			w.fatalf("%v", err)
		}
	case failedDisk:
		must(w.t, drivertest.ShutDown(w.node.DataRoot))
	case absentRegistry, cuttingRegistry, lyingRegistry:
		w.registry.SetFault(registryFaults[kind])
	}
	w.fault = kind
	w.total.faults++
	w.cachesMayGo()
}

func (w *world) filler() string { return filepath.Join(w.node.DataRoot, "filler") }

// mend ends a fault. After a failure of the disk, the pods of the node end, and the node is started again.
func (w *world) mend() {
	w.t.Helper()
	w.tell("mended: %s", w.fault)
	switch w.fault {
	case noFault:
	case fullDisk:
		w.emptyDisk()
	case noInodes:
		must(w.t, errors.Join(os.RemoveAll(w.filler()), syncTo(w.node.DataRoot, ".")))
	case readOnlyDisk:
		must(w.t, unix.Mount("", w.node.DataRoot, "", unix.MS_REMOUNT, ""))
	case failedDisk:
		for len(w.pods) > 0 {
			w.endPod(w.pods[0])
		}
		w.noteMemory()
		must(w.t, w.node.Kill())
		must(w.t, drivertest.UnmountBeneath(w.node.KubeletDir))
		w.remountDisk()
		must(w.t, w.node.Reboot())
		must(w.t, w.node.Start(w.t.Context()))
	case absentRegistry, cuttingRegistry, lyingRegistry:
		w.registry.SetFault(nil)
	}
	w.fault = noFault
}

// takeInodes takes all that the disk has left.
func (w *world) takeInodes() {
	w.t.Helper()
	err := os.Mkdir(w.filler(), 0o700)
	for i := 0; err == nil; i++ {
		err = unix.Mknod(filepath.Join(w.filler(), fmt.Sprint(i)), unix.S_IFREG|0o600, 0)
	}
	if !errors.Is(err, unix.ENOSPC) {
		w.fatalf("%v", err)
	}
}

// emptyDisk removes what has filled the disk, and waits for its space, which xfs and btrfs free in the background.
func (w *world) emptyDisk() {
	w.t.Helper()
	info, err := os.Stat(w.filler())
	must(w.t, err)
	must(w.t, os.Remove(w.filler()))
	// A power cut would bring it back.
	must(w.t, syncTo(w.node.DataRoot, "."))
	w.eventually("the disk has room", func() error {
		var stat unix.Statfs_t
		if err := unix.Statfs(w.node.DataRoot, &stat); err != nil {
			return err
		}
		if free := int64(stat.Bfree) * stat.Bsize; free < info.Size()/2 {
			return fmt.Errorf("%d bytes are free, and the file had %d", free, info.Size())
		}
		return nil
	})
}

// remountDisk mounts the data root again. That it can be unmounted, and that its loop device is free then, shows that nothing on it is in
// use: as long as a view has a part of it, mounting it would bring back the file system that has failed.
func (w *world) remountDisk() {
	w.t.Helper()
	w.unmountDisk()
	must(w.t, drivertest.MountImage(w.fileSystem, w.image(), w.node.DataRoot))
}

func (w *world) unmountDisk() {
	w.t.Helper()
	w.eventually("the data root can be unmounted", func() error { return unix.Unmount(w.node.DataRoot, 0) })
	w.eventually("the file system of the data root has ended", func() error {
		loop, err := linux.FindLoop(w.image(), "")
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			err = fmt.Errorf("it is still on %s", loop.Name())
			loop.Close()
		}
		return err
	})
}

// eventually waits for what happens in the background.
func (w *world) eventually(what string, try func() error) {
	w.t.Helper()
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
	}
	w.fatalf("not after a minute: %s: %v", what, err)
}
