// Package drivertest runs the real driver on directories that look like a node, and plays kubelet: what the demo, the
// tests and the benchmarks share.
package drivertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// DriverName is the name that the driver has by default.
const DriverName = "overlay-csi.github.io"

// LayerRoot is the name of the layer root that every node offers.
const LayerRoot = "layers"

// Build compiles the driver into dir and returns the binary's path. OVERLAY_CSI_BUILD_FLAGS adds flags, such as -race.
//
// OVERLAY_CSI_BINARY names a driver that is built already: make builds it once for all packages, and a virtual machine has no
// Go. The other commands are beside it.
func Build(dir string) (string, error) { return BuildCommand(dir, "overlay-csi") }

// BuildCommand is Build for one of the project's other commands.
func BuildCommand(dir, name string) (string, error) {
	if built := os.Getenv("OVERLAY_CSI_BINARY"); built != "" {
		if !filepath.IsAbs(built) {
			return "", fmt.Errorf("OVERLAY_CSI_BINARY=%s: the path must be absolute", built)
		}
		return filepath.Join(filepath.Dir(built), name), nil
	}
	binary := filepath.Join(dir, name)
	args := []string{"build", "-o", binary}
	if flags := os.Getenv("OVERLAY_CSI_BUILD_FLAGS"); flags != "" {
		args = append(args, flags)
	}
	args = append(args, "github.com/overlay-csi/overlay-csi/cmd/"+name)
	output, err := exec.Command("go", args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", name, err, output)
	}
	return binary, nil
}

// WorkDir makes a directory whose file system can hold uppers. Where the temporary directory's cannot, as in a
// container, it is a tmpfs. remove unmounts everything beneath it and removes it.
func WorkDir() (dir string, remove func() error, err error) {
	if unix.Geteuid() != 0 {
		return "", nil, errors.New("overlay mounts need root: run this as root, or with sudo")
	}
	dir, err = os.MkdirTemp("", "overlay-csi-")
	if err != nil {
		return "", nil, err
	}
	remove = func() error {
		return errors.Join(UnmountBeneath(dir), os.RemoveAll(dir))
	}
	handle, err := os.Open(dir)
	if err != nil {
		return "", nil, err
	}
	defer handle.Close()
	if upper.Probe(handle) == nil {
		return dir, remove, nil
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		return "", nil, fmt.Errorf("mount a tmpfs for the test: %w", err)
	}
	return dir, remove, nil
}

// LacksResource reports whether root here is without CAP_SYS_RESOURCE, as in some sandboxes: ext4 wants it of whoever makes
// a file system larger.
func LacksResource() bool {
	bounding, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_SYS_RESOURCE, 0, 0, 0)
	return err == nil && bounding == 0
}

// Node is the directories of one node and the driver that runs on it.
type Node struct {
	Dir, KubeletDir, DataRoot, LayerDir, Socket string

	binary string
	args   []string
	// running is nil where the driver was stopped, or not started yet.
	running *process
	conn    *grpc.ClientConn
}

// NewNode makes a node in dir, on which binary will run with these flags beside those for the directories.
func NewNode(dir, binary string, args ...string) (*Node, error) {
	n := &Node{
		Dir:        dir,
		KubeletDir: filepath.Join(dir, "kubelet"),
		DataRoot:   filepath.Join(dir, "data"),
		LayerDir:   filepath.Join(dir, "layers"),
		Socket:     filepath.Join(dir, "csi.sock"),
		binary:     binary,
		args:       args,
	}
	for _, path := range []string{filepath.Join(n.KubeletDir, "pods"), n.LayerDir} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return nil, err
		}
	}
	var err error
	n.conn, err = grpc.NewClient("unix://"+n.Socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.5,
			MaxDelay: 50 * time.Millisecond}}))
	return n, err
}

// AddArgs adds flags for the next start.
func (n *Node) AddArgs(args ...string) { n.args = append(n.args, args...) }

// RemoveArg removes a flag for the next start.
func (n *Node) RemoveArg(arg string) {
	n.args = slices.DeleteFunc(n.args, func(other string) bool { return other == arg })
}

// Forget is for a driver that was not meant to start: it has ended by itself.
func (n *Node) Forget() { n.running = nil }

// Start starts the driver and returns when it is ready. The error says what it logged where it ended instead.
func (n *Node) Start(ctx context.Context) error {
	if err := n.Launch(); err != nil {
		return err
	}
	return n.waitReady(ctx)
}

// Launch starts the driver and does not wait for it.
func (n *Node) Launch() error {
	args := append([]string{
		"--endpoint=unix://" + n.Socket,
		"--data-root=" + n.DataRoot,
		"--kubelet-dir=" + n.KubeletDir,
		"--layer-root=" + LayerRoot + "=" + n.LayerDir,
		"--node-id=test-node",
		"--http-endpoint=",
		"--register=false",
		"--certs-dir=" + n.CertsDir(),
	}, n.args...)
	log, err := os.OpenFile(n.logPath(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	p := &process{cmd: exec.Command(n.binary, args...), ended: make(chan struct{})}
	p.cmd.Stderr = log
	// The driver does not outlive a test that is killed.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// Pdeathsig is sent when the thread ends that started the process, and this one lasts as long as the driver.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
			close(p.ended)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start the driver: %w", err)
	}
	n.running = p
	return nil
}

// process is a driver that was started.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
	// err is how it ended, once it has.
	err error
}

func (n *Node) waitReady(ctx context.Context) error {
	// In a virtual machine under emulation, beside other work, a start has taken a minute.
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	p := n.running
	go func() {
		select {
		case <-p.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		response, err := csi.NewIdentityClient(n.conn).Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true))
		if err == nil && response.GetReady().GetValue() {
			return nil
		}
		select {
		case <-ctx.Done():
			select {
			case <-p.ended:
				return fmt.Errorf("the driver ended: %w\n%s", p.err, n.Log())
			default:
				return fmt.Errorf("the driver is not ready: %w\n%s", ctx.Err(), n.Log())
			}
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Stop ends the driver as Kubernetes does, with SIGTERM. Views stay.
func (n *Node) Stop() error { return n.end(syscall.SIGTERM) }

// Kill ends the driver at once, wherever it is.
func (n *Node) Kill() error { return n.end(syscall.SIGKILL) }

func (n *Node) end(signal syscall.Signal) error {
	p := n.running
	if p == nil {
		return nil
	}
	if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.ended:
		n.running = nil
		if signal == syscall.SIGTERM {
			return p.err
		}
		return nil
	case <-time.After(time.Minute):
		return fmt.Errorf("the driver does not end after %s\n%s", signal, n.Log())
	}
}

// PID is that of the driver's process.
func (n *Node) PID() int { return n.running.cmd.Process.Pid }

// Log is what the driver has logged since it was first started.
func (n *Node) Log() string {
	log, err := os.ReadFile(n.logPath())
	if err != nil {
		return err.Error()
	}
	return string(log)
}

func (n *Node) logPath() string { return filepath.Join(n.Dir, "driver.log") }

// Conn is the connection to the driver. It connects again when the driver was started again.
func (n *Node) Conn() *grpc.ClientConn { return n.conn }

// Admin returns the client that overlayctl uses.
func (n *Node) Admin() *api.Client { return api.NewClient(n.AdminSocket()) }

// AdminSocket is the socket that overlayctl talks to.
func (n *Node) AdminSocket() string { return filepath.Join(n.DataRoot, "overlayctl.sock") }

// CertsDir is where the driver looks for the configuration of registries.
func (n *Node) CertsDir() string { return filepath.Join(n.Dir, "certs.d") }

// NodeService is the driver's CSI node service.
func (n *Node) NodeService() csi.NodeClient { return csi.NewNodeClient(n.conn) }

// Controller is the driver's CSI controller service.
func (n *Node) Controller() csi.ControllerClient { return csi.NewControllerClient(n.conn) }

// Identity is the driver's CSI identity service.
func (n *Node) Identity() csi.IdentityClient { return csi.NewIdentityClient(n.conn) }
