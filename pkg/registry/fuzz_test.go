package registry

import (
	"os"
	"path/filepath"
	"testing"
)

// FuzzHosts reads any hosts.toml, and whatever it says sends no credentials over plain HTTP where it does not say so.
func FuzzHosts(f *testing.F) {
	f.Add([]byte("server = \"https://example.com\"\n[host.\"http://mirror:5000\"]\n  capabilities = [\"pull\"]\n"))
	f.Add([]byte("[host.\"https://a\"]\n  skip_verify = true\n  dial_timeout = \"1s\"\n[host.\"https://a\".header]\n  x = \"y\"\n"))
	f.Add([]byte("ca = [\"/nowhere\"]\nclient = [[\"a\", \"b\"]]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "example.com"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "example.com", "hosts.toml"), data, 0o644); err != nil {
			t.Fatal(err)
		}
		hosts, err := NewClient(Config{CertsDir: dir}).hosts("example.com", func(string) (string, string, error) { return "", "", nil })
		if err != nil {
			return
		}
		for _, host := range hosts {
			if host.Client == nil || host.Authorizer == nil {
				t.Errorf("%+v", host)
			}
		}
	})
}
