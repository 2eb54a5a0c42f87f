package integration

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"

	"github.com/overlay-csi/overlay-csi/test/needs"
)

func TestHealth(t *testing.T) {
	address := freeAddress(t)
	startNode(t, "--http-endpoint="+address)
	for _, path := range []string{"/healthz", "/readyz"} {
		if code, body := get(t, "http://"+address+path); code != http.StatusOK || body != "ok\n" {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
}

// freeAddress returns an address of this host that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer listener.Close()
	return listener.Addr().String()
}

func get(t *testing.T, url string) (code int, body string) {
	t.Helper()
	response, err := http.Get(url)
	must(t, err)
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	must(t, err)
	return response.StatusCode, string(content)
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
