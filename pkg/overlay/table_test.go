package overlay

import (
	"fmt"
	"testing"

	"github.com/moby/sys/mountinfo"
)

// BenchmarkViews is what the mount table of many views takes once it has been read.
func BenchmarkViews(b *testing.B) {
	for _, views := range []int{100, 1000, 5000, 20000} {
		b.Run(fmt.Sprint("views=", views), func(b *testing.B) {
			var mounts []*mountinfo.Info
			for i := range views {
				mounts = append(mounts, &mountinfo.Info{
					Minor: i, Mountpoint: fmt.Sprint("/var/lib/kubelet/pods/", i), VFSOptions: "rw,lowerdir+=/a,lowerdir+=/b,lowerdir+=/c",
				})
			}
			for b.Loop() {
				if got := viewsOf(mounts); len(got) != views {
					b.Fatalf("%d views", len(got))
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(views), "ns/view")
		})
	}
}
