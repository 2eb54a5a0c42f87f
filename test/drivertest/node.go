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
	cmd    *exec.Cmd
	exited chan error
	conn   *grpc.ClientConn
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
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.5, MaxDelay: 50 * time.Millisecond}}))
	return n, err
}

// AddArgs adds flags for the next start.
func (n *Node) AddArgs(args ...string) { n.args = append(n.args, args...) }

// Forget is for a driver that was not meant to start: it has ended by itself.
func (n *Node) Forget() { n.cmd = nil }

// Start starts the driver and returns when it is ready.
func (n *Node) Start(ctx context.Context) error {
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
	n.cmd = exec.Command(n.binary, args...)
	log, err := os.OpenFile(n.logPath(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	n.cmd.Stderr = log
	// The driver does not outlive a test that is killed.
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.cmd.Start(); err != nil {
		return fmt.Errorf("start the driver: %w", err)
	}
	exited := make(chan error, 1)
	n.exited = exited
	go func(cmd *exec.Cmd) { exited <- cmd.Wait() }(n.cmd)
	return n.waitReady(ctx)
}

func (n *Node) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		response, err := csi.NewIdentityClient(n.conn).Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true))
		if err == nil && response.GetReady().GetValue() {
			return nil
		}
		select {
		case err := <-n.exited:
			n.exited <- err
			return fmt.Errorf("the driver ended: %w\n%s", err, n.Log())
		case <-ctx.Done():
			return fmt.Errorf("the driver is not ready: %w\n%s", ctx.Err(), n.Log())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Stop ends the driver as Kubernetes does, with SIGTERM. Views stay.
func (n *Node) Stop() error { return n.end(syscall.SIGTERM) }

// Kill ends the driver at once, wherever it is.
func (n *Node) Kill() error { return n.end(syscall.SIGKILL) }

func (n *Node) end(signal syscall.Signal) error {
	if n.cmd == nil {
		return nil
	}
	if err := n.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case err := <-n.exited:
		n.cmd = nil
		if signal == syscall.SIGTERM {
			return err
		}
		return nil
	case <-time.After(30 * time.Second):
		return fmt.Errorf("the driver does not end after %s\n%s", signal, n.Log())
	}
}

// PID is that of the driver's process.
func (n *Node) PID() int { return n.cmd.Process.Pid }

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
