// Command pull measures what it takes to pull and unpack an image: the driver's layer store beside containerd and beside
// tar with the fastest decompressor there is, in turn, on one disk, from a registry on loopback. Needs root, and containerd
// and ctr in PATH or in the directory that -containerd names.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/procfs"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/gunzip"
	"github.com/overlay-csi/overlay-csi/pkg/linux/sandbox"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

func main() {
	log.SetFlags(0)
	b := &bench{}
	var pull string
	flag.StringVar(&b.dir, "dir", "", "`directory` on the disk to measure (default: a temporary one)")
	flag.StringVar(&b.containerd, "containerd", "", "`directory` with containerd and ctr (default: PATH)")
	flag.IntVar(&b.rounds, "rounds", 3, "rounds of each")
	flag.IntVar(&b.layers, "layers", 5, "layers of the image")
	flag.IntVar(&b.megabytes, "megabytes", 500, "size of the image's files")
	flag.IntVar(&b.files, "files", 20_000, "number of files in the image")
	flag.StringVar(&b.gzipProgram, "gzip-program", "/usr/bin/igzip", "igzip for the driver's layer store; empty: none")
	flag.StringVar(&b.compression, "compression", "gzip", "gzip or zstd")
	flag.BoolVar(&b.sync, "sync", false, "have tar and containerd end with a sync, as the store does")
	flag.StringVar(&pull, "pull", "", "internal: pull this image into -dir")
	if len(os.Args) > 1 && os.Args[1] == sandboxCommand {
		os.Exit(sandbox.Main(os.Args[2:]))
	}
	flag.Parse()
	var err error
	switch {
	case pull != "":
		err = pullWithStore(b.dir, pull, b.gzipProgram)
	default:
		err = b.run()
	}
	if err != nil {
		log.Fatal(err)
	}
}

type bench struct {
	dir, containerd, compression     string
	gzipProgram                      string
	rounds, layers, megabytes, files int
	sync                             bool

	registry *registrytest.Registry
	image    string
	blobs    []string
}

func (b *bench) run() error {
	if b.dir == "" {
		dir, err := os.MkdirTemp("", "overlay-csi-pull-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		b.dir = dir
	}
	stop, err := b.prepare()
	if err != nil {
		return err
	}
	defer stop()
	ways := []struct {
		name string
		run  func(dir string) (time.Duration, string, error)
	}{{"overlay-csi", b.runStore}, {"tar", b.runTar}, {"containerd", b.runContainerd}}
	if _, err := exec.LookPath(b.program("containerd")); err != nil {
		log.Printf("without containerd: %v", err)
		ways = ways[:2]
	}
	times := map[string][]time.Duration{}
	notes := map[string]string{}
	for round := range b.rounds {
		for _, way := range ways {
			dir := filepath.Join(b.dir, "run")
			if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o755)); err != nil {
				return err
			}
			syscall.Sync()
			took, note, err := way.run(dir)
			if err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
			log.Printf("round %d: %s: %s %s", round+1, way.name, took.Round(time.Millisecond), note)
			times[way.name] = append(times[way.name], took)
			notes[way.name] = note
		}
	}
	fmt.Printf(
		"| %d layers, %d MB, %d files, %s | median | to overlay-csi |\n| --- | --- | --- |\n",
		b.layers,
		b.megabytes,
		b.files,
		b.compression,
	)
	ours := median(times["overlay-csi"])
	for _, way := range ways {
		m := median(times[way.name])
		fmt.Printf("| %s %s | %.2f s | %.2f |\n", way.name, notes[way.name], m.Seconds(), ours.Seconds()/m.Seconds())
	}
	return nil
}

func median(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[len(times)/2]
}

// runStore pulls with the driver's layer store in a process of its own, whose peak memory is the note.
func (b *bench) runStore(dir string) (time.Duration, string, error) {
	cmd := exec.Command(os.Args[0], "-pull", b.image, "-dir", dir, "-gzip-program", b.gzipProgram)
	cmd.Stderr = os.Stderr
	output, err := cmd.Output()
	if err != nil {
		return 0, "", err
	}
	var result pullResult
	if err := json.Unmarshal(output, &result); err != nil {
		return 0, "", err
	}
	cpu := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return result.Took, fmt.Sprintf("(peak memory %d MiB, CPU %.2f s)", result.PeakBytes>>20, cpu.Seconds()), nil
}

// pullResult is what a pull in a process of its own tells.
type pullResult struct {
	Took      time.Duration
	PeakBytes uint64
}

// benchRoot is a data root without volumes.
type benchRoot struct{ dir *os.File }

func (r benchRoot) Dir() *os.File { return r.dir }

func (r benchRoot) Discard(path string) error { return os.RemoveAll(path) }

// AwaitDeleted has nothing to wait for.
func (r benchRoot) AwaitDeleted(context.Context) error { return nil }

func (r benchRoot) LayersInUse() (map[digest.Digest][]string, error) {
	return map[digest.Digest][]string{}, nil
}

// sandboxCommand is the argument with which this program becomes igzip.
const sandboxCommand = "sandbox"

// pullWithStore prints what a pull took.
func pullWithStore(dir, image, gzipProgram string) error {
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	root, err := os.Open(dir)
	if err != nil {
		return err
	}
	certs := filepath.Join(dir, "certs.d")
	host, _, _ := strings.Cut(image, "/")
	name := strings.Replace(host, ":", "_", 1) + "_"
	toml := fmt.Sprintf("server = \"http://%s\"\n", host)
	hostDir := filepath.Join(certs, name)
	if err := errors.Join(os.MkdirAll(hostDir, 0o755), os.WriteFile(filepath.Join(hostDir, "hosts.toml"), []byte(toml), 0o644)); err != nil {
		return err
	}
	registries := registry.NewClient(registry.Config{CertsDir: certs, StallTimeout: time.Minute, Backoff: time.Second})
	config := store.Config{MaxConcurrentLayerPulls: 4}
	if gzipProgram != "" {
		decompressor, err := gunzip.New(gunzip.Config{
			Program: gzipProgram, Helper: []string{"/proc/self/exe", sandboxCommand}, StallTimeout: time.Minute,
		})
		if err != nil {
			return err
		}
		config.Gunzip = decompressor.Gunzip
	}
	s, err := store.New(context.Background(), benchRoot{root}, benchRoot{root}, registries, config)
	if err != nil {
		return err
	}
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return err
	}
	begin := time.Now()
	lease, err := s.Pull(context.Background(), named.(reference.Canonical), registry.Credentials{}, "")
	if err != nil {
		return err
	}
	took := time.Since(begin)
	lease.Release()
	peak, err := peakMemory()
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(pullResult{took, peak})
}

// peakMemory is what this process has had in memory at most.
func peakMemory() (uint64, error) {
	process, err := procfs.Self()
	if err != nil {
		return 0, err
	}
	status, err := process.NewStatus()
	return status.VmHWM, err
}

// decompressors by compression, the fastest first.
var decompressors = map[string][][]string{
	"gzip": {{"rapidgzip", "-d", "-c"}, {"igzip", "-d", "-c"}, {"unpigz", "-c"}, {"gzip", "-d", "-c"}},
	"zstd": {{"zstd", "-d", "-c", "-q"}},
}

func (b *bench) runTar(dir string) (time.Duration, string, error) {
	var decompressor []string
	for _, candidate := range decompressors[b.compression] {
		if _, err := exec.LookPath(candidate[0]); err == nil {
			decompressor = candidate
			break
		}
	}
	if decompressor == nil {
		return 0, "", fmt.Errorf("no program decompresses %s", b.compression)
	}
	begin := time.Now()
	for i, blob := range b.blobs {
		layer := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(layer, 0o755); err != nil {
			return 0, "", err
		}
		script := fmt.Sprintf("%s < %s | tar -x --numeric-owner --xattrs -p -C %s", strings.Join(decompressor, " "), blob, layer)
		if output, err := exec.Command("bash", "-o", "pipefail", "-c", script).CombinedOutput(); err != nil {
			return 0, "", fmt.Errorf("%s: %w: %s", script, err, output)
		}
	}
	b.maybeSync()
	return time.Since(begin), "-x with " + decompressor[0], nil
}

func (b *bench) maybeSync() {
	if b.sync {
		syscall.Sync()
	}
}

// program is the path of one of containerd's programs.
func (b *bench) program(name string) string { return filepath.Join(b.containerd, name) }

// runContainerd pulls with containerd, which is started anew with nothing in it.
func (b *bench) runContainerd(dir string) (time.Duration, string, error) {
	socket := filepath.Join(dir, "containerd.sock")
	config := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(config, []byte("version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n"), 0o644); err != nil {
		return 0, "", err
	}
	daemon := exec.Command(
		b.program("containerd"),
		"--config",
		config,
		"--address",
		socket,
		"--root",
		filepath.Join(dir, "root"),
		"--state",
		filepath.Join(dir, "state"),
		"--log-level",
		"error",
	)
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := daemon.Start(); err != nil {
		return 0, "", err
	}
	defer func() { _ = daemon.Process.Signal(syscall.SIGTERM); _ = daemon.Wait() }()
	ctr := func(args ...string) ([]byte, error) {
		return exec.Command(b.program("ctr"), append([]string{"--address", socket}, args...)...).CombinedOutput()
	}
	for tries := 0; ; tries++ {
		output, err := ctr("version")
		if err == nil {
			break
		}
		if tries > 300 {
			return 0, "", fmt.Errorf("containerd does not answer: %s", output)
		}
		time.Sleep(50 * time.Millisecond)
	}
	version, err := exec.Command(b.program("containerd"), "--version").Output()
	if err != nil {
		return 0, "", err
	}
	begin := time.Now()
	if output, err := ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", b.image); err != nil {
		return 0, "", fmt.Errorf("ctr images pull: %w: %s", err, output)
	}
	b.maybeSync()
	took := time.Since(begin)
	fields := strings.Fields(string(version))
	return took, fields[2], nil
}

// findBlobs are the paths of the blobs of the layers in the registry's directory.
func findBlobs(dir string, digests []string) ([]string, error) {
	var found []string
	for _, digest := range digests {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && strings.Contains(path, digest) && !entry.IsDir() {
				found = append(found, path)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	if len(found) != len(digests) {
		return nil, fmt.Errorf("%d blobs of %d layers in %s", len(found), len(digests), dir)
	}
	return found, nil
}
