package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// TestCacheTimes logs how long two jobs take that need 5,000 files of 20 KiB: the first writes them, and the second has them.
func TestCacheTimes(t *testing.T) {
	takesMinutes(t)
	node, statuses := cacheNode(t)
	deps := cacheVolume("ci", "cache://deps", "deps")
	const files = 5000
	content := make([]byte, 20<<10)
	for _, name := range []string{"first", "second"} {
		began := time.Now()
		pod := newPod(t, node, name)
		target := publish(t, pod, deps)
		published := time.Since(began)
		made := 0
		for i := range files {
			path := filepath.Join(target, fmt.Sprint(i%100), fmt.Sprint(i))
			if _, err := os.Stat(path); err == nil {
				continue
			}
			made++
			must(t, os.MkdirAll(filepath.Dir(path), 0o755))
			must(t, os.WriteFile(path, content, 0o644))
		}
		worked := time.Since(began) - published
		statuses.Set(pod, corev1.PodSucceeded)
		ending := time.Now()
		unpublish(t, pod, deps)
		t.Logf("%s job: published in %s, made %d files in %s, unpublished and committed in %s",
			name, published, made, worked, time.Since(ending))
		removePod(t, pod)
		if (made > 0) != (name == "first") {
			t.Errorf("the %s job made %d files", name, made)
		}
	}
}
