package record_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// BenchmarkLayersInUse: many volumes of one image, as garbage collection and overlayctl ask for them.
func BenchmarkLayersInUse(b *testing.B) {
	parsed, err := spec.Parse(map[string]string{"layers": "dir://r/a"}, spec.Scope{Inline: true})
	if err != nil {
		b.Fatal(err)
	}
	var layers []digest.Digest
	for i := range 20 {
		layers = append(layers, digest.FromString(fmt.Sprint(i)))
	}
	for _, volumes := range []int{100, 1000, 5000} {
		b.Run(fmt.Sprint("volumes=", volumes), func(b *testing.B) {
			dir := b.TempDir()
			records := record.NewStore(dir, dir, nil)
			for i := range volumes {
				// As the IDs of inline volumes are, which differ at their ends at the earliest.
				id := fmt.Sprintf("csi-%060d", i)
				r := &record.Record{ID: id, Spec: parsed, Inline: true, Layers: layers}
				if err := records.Save(r.With(record.Publication{Target: filepath.Join(dir, id)})); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				used, err := records.LayersInUse()
				if err != nil || len(used[layers[0]]) != volumes {
					b.Fatalf("%d users, %v", len(used[layers[0]]), err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/float64(volumes), "µs/volume")
		})
	}
}
