package integration

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/overlay-csi/overlay-csi/test/needs"
)

func TestRegistersWithKubelet(t *testing.T) {
	node := newNode(t, "--register=true", "--registration-path=/host/path/csi.sock")
	start(t, node)
	socket := filepath.Join(node.KubeletDir, "plugins_registry/overlay-csi.github.io-reg.sock")
	eventually(t, "the registration socket is there", func() bool {
		_, err := os.Stat(socket)
		return err == nil
	})
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	client := registerapi.NewRegistrationClient(conn)
	info, err := client.GetInfo(timeout(t), &registerapi.InfoRequest{})
	must(t, err)
	if info.GetType() != registerapi.CSIPlugin || info.GetName() != "overlay-csi.github.io" || info.GetEndpoint() != "/host/path/csi.sock" ||
		len(info.GetSupportedVersions()) != 1 {
		t.Errorf("registered as %v", info)
	}
	_, err = client.NotifyRegistrationStatus(timeout(t), &registerapi.RegistrationStatus{PluginRegistered: false, Error: "because"})
	must(t, err)
	if log := node.Log(); !strings.Contains(log, "Kubelet refused the driver") || !strings.Contains(log, "because") {
		t.Error("the log does not say that kubelet refused the driver")
	}
	must(t, node.Stop())
	wantAbsent(t, socket)
	wantAbsent(t, node.Socket)
}

func TestHealth(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	address := listener.Addr().String()
	must(t, listener.Close())
	startNode(t, "--http-endpoint="+address)
	for _, path := range []string{"/healthz", "/readyz"} {
		response, err := http.Get("http://" + address + path)
		must(t, err)
		body, err := io.ReadAll(response.Body)
		must(t, err)
		response.Body.Close()
		if response.StatusCode != http.StatusOK || string(body) != "ok\n" {
			t.Errorf("%s: %s %q", path, response.Status, body)
		}
	}
}

func TestLogHasOneLineForAnRPC(t *testing.T) {
	node := startNode(t, "--log-format=json")
	v := inline("layers", layersOf(t, node, map[string]string{"f": "f"}))
	pod := newPod(t, node, "trainer")
	publish(t, pod, v)
	unpublish(t, pod, v)
	for _, method := range []string{"NodePublishVolume", "NodeUnpublishVolume"} {
		var lines []string
		for line := range strings.Lines(node.Log()) {
			if strings.Contains(line, method) {
				lines = append(lines, line)
			}
		}
		if len(lines) != 1 {
			t.Fatalf("%d lines for %s", len(lines), method)
		}
		words := []string{`"volume":"` + pod.Request(v).GetVolumeId(), `"duration":`, `"code":"OK"`, pod.UID}
		if method == "NodePublishVolume" {
			words = append(words, "trainer")
		}
		for _, word := range words {
			if !strings.Contains(lines[0], word) {
				t.Errorf("%s does not have %s", lines[0], word)
			}
		}
	}
}

func TestCommandLine(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		code int
		word string
	}{
		"version":          {[]string{"--version"}, 0, "overlay-csi "},
		"help":             {[]string{"--help"}, 0, `(default "/var/lib/overlay-csi")`},
		"unknown flag":     {[]string{"--nonsense"}, 2, "nonsense"},
		"argument":         {[]string{"run"}, 2, `"run"`},
		"layer root":       {[]string{"--layer-root=models"}, 2, "NAME=PATH"},
		"layer root twice": {[]string{"--layer-root=m=/a", "--layer-root=m=/b"}, 2, "duplicate name"},
		"mounts of none":   {[]string{"--layer-root-allow-submounts=m"}, 2, "no --layer-root"},
		"relative root": {[]string{"--data-root=" + t.TempDir(), "--layer-root=m=relative", "--register=false", "--http-endpoint=",
			"--endpoint=/tmp/x.sock"}, 1, "absolute"},
		"kernel feature": {[]string{"--data-root=" + t.TempDir(), "--disable-kernel-features=warp"}, 1, "warp"},
		"mount option":   {[]string{"--allow-mount-option=exec"}, 2, "dev, suid"},
		"endpoint":       {[]string{"--data-root=" + t.TempDir(), "--endpoint=tcp://1.2.3.4:5"}, 1, "unix://"},
	} {
		t.Run(name, func(t *testing.T) {
			if strings.Contains(strings.Join(c.args, " "), "--data-root=") {
				// The driver looks whether the data root can hold an upper before it looks at these.
				needs.Root(t)
			}
			output, err := exec.Command(driverBinary(t), c.args...).CombinedOutput()
			code := 0
			if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
				code = exit.ExitCode()
			} else {
				must(t, err)
			}
			if code != c.code || !strings.Contains(string(output), c.word) {
				t.Errorf("exit code %d, want %d with %q:\n%s", code, c.code, c.word, output)
			}
		})
	}
}
