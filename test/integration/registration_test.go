package integration

import (
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// pluginWatcher plays kubelet's: it asks each socket that it sees once, and never again.
type pluginWatcher struct {
	socket string
	// seen is the socket that it asked last.
	seen os.FileInfo
}

// startRegistering starts a node whose driver registers. url is where its health is.
func startRegistering(t *testing.T) (node *drivertest.Node, watcher *pluginWatcher, url string) {
	t.Helper()
	address := freeAddress(t)
	node = startNode(t, "--register=true", "--registration-path=/host/path/csi.sock", "--http-endpoint="+address, "--volume-health")
	socket := filepath.Join(node.KubeletDir, "plugins_registry", drivertest.DriverName+"-reg.sock")
	return node, &pluginWatcher{socket: socket}, "http://" + address
}

// register waits for a socket that it has not seen, and answers as kubelet does: refusal is why it refuses, "" if it does not.
func (w *pluginWatcher) register(t *testing.T, refusal string) {
	t.Helper()
	eventually(t, "there is a new registration socket", func() bool {
		info, err := os.Lstat(w.socket)
		if err != nil || w.seen != nil && os.SameFile(info, w.seen) {
			return false
		}
		w.seen = info
		return true
	})
	w.answer(t, refusal)
}

// answer asks for the plugin, and says whether it is registered.
func (w *pluginWatcher) answer(t *testing.T, refusal string) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+w.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	client := registerapi.NewRegistrationClient(conn)
	info, err := client.GetInfo(timeout(t), &registerapi.InfoRequest{}, grpc.WaitForReady(true))
	must(t, err)
	if info.GetType() != registerapi.CSIPlugin || info.GetName() != drivertest.DriverName || info.GetEndpoint() != "/host/path/csi.sock" ||
		len(info.GetSupportedVersions()) != 1 {
		t.Errorf("registered as %v", info)
	}
	_, err = client.NotifyRegistrationStatus(timeout(t), &registerapi.RegistrationStatus{PluginRegistered: refusal == "", Error: refusal})
	must(t, err)
}

// wantRegistered checks that readiness and health say that kubelet has the driver.
func wantRegistered(t *testing.T, node *drivertest.Node, url string) {
	t.Helper()
	if code, body := get(t, url+"/readyz"); code != http.StatusOK || body != "ok\n" {
		t.Errorf("/readyz: %d %q", code, body)
	}
	if conditions := storageConditions(t, node); len(conditions) > 0 {
		t.Errorf("health: %v", conditions)
	}
}

// wantUnregistered waits until readiness says why kubelet does not have the driver, and checks that health does too, and that the
// process counts as alive.
func wantUnregistered(t *testing.T, node *drivertest.Node, url, why string) {
	t.Helper()
	eventually(t, "/readyz says: "+why, func() bool {
		code, body := get(t, url+"/readyz")
		return code == http.StatusServiceUnavailable && strings.Contains(body, why)
	})
	conditions := storageConditions(t, node)
	if len(conditions) != 1 || conditions[0].GetReason() != "NotRegistered" || !strings.Contains(conditions[0].GetMessage(), why) {
		t.Errorf("health: %v; want NotRegistered: %s", conditions, why)
	}
	if code, body := get(t, url+"/healthz"); code != http.StatusOK {
		t.Errorf("/healthz: %d %q", code, body)
	}
}

func storageConditions(t *testing.T, node *drivertest.Node) []*csi.NodeGetStorageHealthResponse_StorageBackendHealth {
	t.Helper()
	response, err := node.NodeService().NodeGetStorageHealth(timeout(t), &csi.NodeGetStorageHealthRequest{})
	must(t, err)
	return response.GetBackendHealth()
}

func TestRegistersWithKubelet(t *testing.T) {
	node, watcher, url := startRegistering(t)
	wantUnregistered(t, node, url, "kubelet has not registered the driver yet")
	watcher.register(t, "")
	wantRegistered(t, node, url)
	// A kubelet that starts again asks the same socket.
	watcher.answer(t, "")
	wantRegistered(t, node, url)
	must(t, node.Stop())
	wantAbsent(t, watcher.socket)
	wantAbsent(t, node.Socket)
}

// TestRefusedRegistrationIsRepeated: kubelet asks a socket once, so the driver makes another one.
func TestRefusedRegistrationIsRepeated(t *testing.T) {
	node, watcher, url := startRegistering(t)
	for range 2 {
		watcher.register(t, "because\x1b[2J of "+strings.Repeat("a long story ", 100_000))
		wantUnregistered(t, node, url, "kubelet refused the driver: because")
		if _, body := get(t, url+"/readyz"); len(body) > 4<<10 || strings.Contains(body, "\x1b") {
			t.Errorf("/readyz has %d bytes", len(body))
		}
	}
	watcher.register(t, "")
	wantRegistered(t, node, url)
	// What kubelet says of an older socket holds too: it may have tried again by itself.
	watcher.answer(t, "later")
	wantUnregistered(t, node, url, "kubelet refused the driver: later")
	watcher.answer(t, "")
	wantRegistered(t, node, url)
	for line := range strings.Lines(node.Log()) {
		if len(line) > 4<<10 {
			t.Errorf("the log has a line of %d bytes: %.100s", len(line), line)
		}
	}
}

func TestLostSocketIsMadeAgain(t *testing.T) {
	node, watcher, url := startRegistering(t)
	for name, lose := range map[string]func(t *testing.T){
		"deleted":           func(t *testing.T) { must(t, os.Remove(watcher.socket)) },
		"directory deleted": func(t *testing.T) { must(t, os.RemoveAll(filepath.Dir(watcher.socket))) },
		"a dead process's": func(t *testing.T) {
			must(t, replaceSocket(t, watcher.socket).Close())
		},
	} {
		t.Run(name, func(t *testing.T) {
			watcher.register(t, "")
			wantRegistered(t, node, url)
			lose(t)
			wantUnregistered(t, node, url, "kubelet has not registered the driver yet")
		})
	}
	watcher.register(t, "")
	wantRegistered(t, node, url)
	// The socket for CSI is kept in the same way.
	must(t, os.Remove(node.Socket))
	eventually(t, "the CSI socket is there", func() bool {
		conn, err := net.Dial("unix", node.Socket)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// TestSocketOfAnotherProcess: two drivers of one name do not take the socket from each other in turns, and one that ends leaves the
// other's.
func TestSocketOfAnotherProcess(t *testing.T) {
	node, watcher, url := startRegistering(t)
	watcher.register(t, "")
	other := replaceSocket(t, watcher.socket)
	wantUnregistered(t, node, url, "another process")
	// When the other ends, the socket is this driver's again.
	must(t, other.Close())
	watcher.register(t, "")
	wantRegistered(t, node, url)

	replaceSocket(t, watcher.socket)
	must(t, node.Stop())
	conn, err := net.Dial("unix", watcher.socket)
	if err != nil {
		t.Fatalf("a driver that ended has removed another's socket: %v", err)
	}
	conn.Close()
}

// replaceSocket puts a socket of the test's in the place of another, at once. The file stays when the listener is closed.
func replaceSocket(t *testing.T, path string) *net.UnixListener {
	t.Helper()
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path + ".new", Net: "unix"})
	must(t, err)
	listener.SetUnlinkOnClose(false)
	t.Cleanup(func() { listener.Close() })
	must(t, os.Rename(path+".new", path))
	return listener
}
