package integration

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

const (
	// memoryLimit is that of the chart.
	memoryLimit = 512 << 20
	// memoryBound is what the driver keeps below.
	memoryBound = 256 << 20
)

// limitMemory limits the driver until it ends or the test does.
func limitMemory(t *testing.T, node *drivertest.Node) (remove func()) {
	t.Helper()
	unlimit, err := node.LimitMemory(memoryLimit)
	if err != nil {
		t.Logf("the driver has no limit, and is only measured: %v", err)
		return func() {}
	}
	once := sync.OnceValue(unlimit)
	remove = func() { must(t, once()) }
	t.Cleanup(remove)
	return remove
}

// memoryCase is what somebody chooses that the driver reads.
type memoryCase struct {
	name string
	test func(t *testing.T, node *drivertest.Node)
}

// TestMemoryOfUppers has pods choose what the driver reads, and checks what it takes for that. It is killed at the limit of the chart.
func TestMemoryOfUppers(t *testing.T) {
	node := newNode(t)
	// What is deep is not deleted, but goes with its file system: to remove it one level at a time takes minutes.
	for _, dir := range []string{node.DataRoot, node.LayerDir} {
		must(t, os.MkdirAll(dir, 0o700))
		mountTmpfs(t, dir)
	}
	wantMemory(t, node, []memoryCase{
		{"stats of a deep upper", statsOfADeepUpper},
		{"stats of a wide upper", statsOfAWideUpper},
		{"owners of a deep layer", ownersOfADeepLayer},
	})
}

// TestMemoryOfImages is the same for registries and archives. The data root is not in memory: what is decompressed there would count.
func TestMemoryOfImages(t *testing.T) {
	wantMemory(t, newNode(t), []memoryCase{
		{"a token without end", tokenWithoutEnd},
		{"large configurations at once", largeConfigurations},
		{"links of an archive", linksOfAnArchive},
		{"replaced directories", replacedDirectories},
	})
}

func wantMemory(t *testing.T, node *drivertest.Node, cases []memoryCase) {
	t.Helper()
	start(t, node)
	limitMemory(t, node)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			must(t, node.ResetPeakMemory())
			c.test(t, node)
			wantPeak(t, node)
		})
	}
	wantNothingLeft(t, node)
}

func wantPeak(t *testing.T, node *drivertest.Node) {
	t.Helper()
	peak, err := node.PeakMemory()
	must(t, err)
	t.Logf("the driver took %d MiB at most", peak>>20)
	if peak > memoryBound {
		t.Errorf("the driver took %d MiB; the bound is %d", peak>>20, memoryBound>>20)
	}
}

// deepen makes a chain of directories in dir. It names none of them by a path, which would be too long.
func deepen(t *testing.T, dir, name string, levels int) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	for range levels {
		must(t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		must(t, unix.Close(fd))
		fd = next
	}
	must(t, unix.Close(fd))
}

func statsOfADeepUpper(t *testing.T, node *drivertest.Node) {
	levels := proof(1500, 20_000)
	pod, v := newPod(t, node, "deep"), inline("layers", layersOf(t, node, map[string]string{"f": "f"}))
	publish(t, pod, v)
	deepen(t, upperDir(node, pod, v), strings.Repeat("d", 255), levels)
	if _, inodes := stats(t, node, pod, v); inodes.GetUsed() < int64(levels) {
		t.Errorf("%d inodes are used", inodes.GetUsed())
	}
	unpublish(t, pod, v)
}

func statsOfAWideUpper(t *testing.T, node *drivertest.Node) {
	links := proof(100_000, 2_000_000)
	pod, v := newPod(t, node, "wide"), inline("layers", layersOf(t, node, map[string]string{"f": "f"}))
	publish(t, pod, v)
	dir := upperDir(node, pod, v)
	// ext4 takes 65,000 links to a file.
	const linksPerFile = 60_000
	var file string
	for i := range links {
		name := filepath.Join(dir, fmt.Sprintf("%0200d", i))
		if i%linksPerFile == 0 {
			file = name
			write(t, file, "x")
			continue
		}
		must(t, os.Link(file, name))
	}
	_, inodes := stats(t, node, pod, v)
	if want := int64(links/linksPerFile + 1); inodes.GetUsed() < want || inodes.GetUsed() > want+2 {
		t.Errorf("%d inodes are used instead of %d", inodes.GetUsed(), want)
	}
	unpublish(t, pod, v)
}

func ownersOfADeepLayer(t *testing.T, node *drivertest.Node) {
	levels := proof(4000, 16_000)
	layer, err := node.Layer("deep", map[string]string{"f": "f"})
	must(t, err)
	deepen(t, layer, "d", levels)
	pod, v := newPod(t, node, "owners"), inline("layers", drivertest.Layers("deep"), "ownership", "chown")
	v.Group = "2000"
	target := publish(t, pod, v)
	var stat unix.Stat_t
	must(t, unix.Stat(target+strings.Repeat("/d", 1000), &stat))
	if stat.Gid != 2000 {
		t.Errorf("the directory at depth 1000 belongs to group %d", stat.Gid)
	}
	unpublish(t, pod, v)
}

// tokenWithoutEnd is a registry whose token server sends a token until nobody reads it any more.
func tokenWithoutEnd(t *testing.T, node *drivertest.Node) {
	r := startRegistry(t, node, registrytest.Options{})
	r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
		if request.URL.Path != "/token" {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x",scope="x"`, r.Host))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		const maxToken = 1 << 30
		_, err := io.WriteString(w, `{"token": "`)
		for sent := 0; err == nil && sent < maxToken; sent += 1 << 20 {
			_, err = w.Write(bytes.Repeat([]byte("t"), 1<<20))
		}
		if err == nil {
			t.Error("the driver read all of the token")
		}
		return true
	})
	_, err := newPod(t, node, "token").Publish(timeout(t), inline("layers", "oci://"+r.Host+"/a:1"))
	if err == nil || !strings.Contains(err.Error(), "the token server's answer has more than") {
		t.Errorf("a token without end: %v", err)
	}
}

// served are the manifests and blobs of a registry by digest.
type served map[string][]byte

func (s served) add(data []byte) digest.Digest {
	id := digest.FromBytes(data)
	s[id.String()] = data
	return id
}

func (s served) serve(w http.ResponseWriter, r *http.Request) bool {
	data, ok := s[path.Base(r.URL.Path)]
	if !ok {
		return false
	}
	w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
	w.Header().Set("Docker-Content-Digest", path.Base(r.URL.Path))
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	if r.Method == http.MethodGet {
		_, _ = w.Write(data)
	}
	return true
}

// largeConfigurations are images with configurations as large as they may be, of the content that takes the most memory.
func largeConfigurations(t *testing.T, node *drivertest.Node) {
	const pulls, size = 24, 8 << 20
	r := startRegistry(t, node, registrytest.Options{})
	content := served{}
	ids := strings.Repeat(`"",`, (size-100)/3) + `""`
	config := content.add([]byte(`{"rootfs":{"diff_ids":[` + ids + `]}}`))
	var images []string
	for i := range pulls {
		manifest := fmt.Sprintf(`{"annotations":{"i":"%d"},"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[{"digest":%q}]}`,
			i, types.OCIConfigJSON, config, len(content[config.String()]), digest.FromString("layer"))
		images = append(images, fmt.Sprintf("oci://%s/a%d@%s", r.Host, i, content.add([]byte(manifest))))
	}
	r.SetFault(content.serve)
	var group sync.WaitGroup
	for i, image := range images {
		pod := newPod(t, node, fmt.Sprint("config-", i))
		group.Go(func() {
			_, err := pod.Publish(timeout(t), inline("layers", image))
			if err == nil || !strings.Contains(err.Error(), "diff IDs") {
				t.Errorf("a configuration of %d MiB: %v", size>>20, err)
			}
		})
	}
	group.Wait()
}

// writeZstd writes a compressed tar to a file.
func writeZstd(t *testing.T, path string, entries func(write func(*tar.Header))) {
	t.Helper()
	file, err := os.Create(path)
	must(t, err)
	defer file.Close()
	compressed, err := zstd.NewWriter(file, zstd.WithEncoderLevel(zstd.SpeedFastest))
	must(t, err)
	out := tar.NewWriter(compressed)
	entries(func(header *tar.Header) { must(t, out.WriteHeader(header)) })
	must(t, out.Close())
	must(t, compressed.Close())
}

func linksOfAnArchive(t *testing.T, node *drivertest.Node) {
	links := proof(150_000, 3_000_000)
	writeZstd(t, filepath.Join(node.LayerDir, "links.tar.zst"), func(write func(*tar.Header)) {
		write(&tar.Header{Name: "manifest.json", Typeflag: tar.TypeReg})
		for i := range links {
			write(&tar.Header{Name: fmt.Sprintf("sha256:%064x", i), Linkname: fmt.Sprintf("sha256:%064x", i+1), Typeflag: tar.TypeSymlink})
		}
	})
	_, err := newPod(t, node, "links").Publish(timeout(t), inline("layers", "archive://"+drivertest.LayerRoot+"/links.tar.zst"))
	wantCode(t, err, codes.InvalidArgument, "100000 entries")
}

func replacedDirectories(t *testing.T, node *drivertest.Node) {
	directories := proof(10_000, 1_000_000)
	writeZstd(t, filepath.Join(node.LayerDir, "replaced.tar.zst"), func(write func(*tar.Header)) {
		for range directories {
			write(&tar.Header{Name: "replaced/", Typeflag: tar.TypeDir, Mode: 0o755})
			write(&tar.Header{Name: "replaced", Typeflag: tar.TypeReg, Mode: 0o644})
		}
	})
	pod, v := newPod(t, node, "replaced"), inline("layers", "archive://"+drivertest.LayerRoot+"/replaced.tar.zst")
	// An archive that takes longer than kubelet's patience is unpacked by one request and found by another.
	target, err := pod.Publish(timeout(t), v)
	for try := 0; status.Code(err) == codes.Unavailable && try < 10; try++ {
		target, err = pod.Publish(timeout(t), v)
	}
	must(t, err)
	wantFile(t, filepath.Join(target, "replaced"), "")
	unpublish(t, pod, v)
}

// TestMemoryOfImageRecords is a pod with many references (121 is the most), to images of the same tiny layer whose manifests are as long
// as they can be. What is stored of them is read when the driver starts.
func TestMemoryOfImageRecords(t *testing.T) {
	const layers = 500
	images := proof(30, 121)
	node := startNode(t)
	remove := limitMemory(t, node)
	r := startRegistry(t, node, registrytest.Options{})
	data, err := registrytest.Tar(registrytest.File("f", "tiny"))
	must(t, err)
	content := served{}
	layer := content.add(data)
	repeat := func(item string) string { return strings.Repeat(item+",", layers-1) + item }
	config := content.add([]byte(`{"architecture":"amd64","os":"linux","rootfs":{"diff_ids":[` + repeat(`"`+layer.String()+`"`) + `]}}`))
	references := func(mediaType string, padding int) string {
		descriptors := repeat(fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, mediaType, layer, len(data)))
		var refs []string
		for i := range images {
			manifest := fmt.Sprintf(`{"schemaVersion":2,"annotations":{"i":"%d","padding":%q},"config":{"mediaType":%q,"digest":%q,"size":%d},`+
				`"layers":[%s]}`, i, strings.Repeat("p", padding), types.OCIConfigJSON, config, len(content[config.String()]), descriptors)
			refs = append(refs, fmt.Sprintf("oci://%s/a@%s", r.Host, content.add([]byte(manifest))))
		}
		return strings.Join(refs, "\n")
	}
	longest := references(string(types.OCIUncompressedLayer)+";"+strings.Repeat("x", 4<<10), 0)
	valid := references(string(types.OCIUncompressedLayer), proof(100<<10, 2<<20))
	r.SetFault(content.serve)
	pod, v := newPod(t, node, "pod"), inline("layers", valid)
	_, err = newPod(t, node, "longest").Publish(timeout(t), inline("layers", longest))
	wantCode(t, err, codes.InvalidArgument, "media type")
	wantPeak(t, node)
	var target string
	eventually(t, "all images are pulled", func() bool {
		var err error
		target, err = pod.Publish(timeout(t), v)
		return err == nil
	})
	wantFile(t, filepath.Join(target, "f"), "tiny")
	wantPeak(t, node)
	must(t, node.Stop())
	remove()
	start(t, node)
	limitMemory(t, node)
	wantPeak(t, node)
	unpublish(t, pod, v)
	wantNothingLeft(t, node)
}
