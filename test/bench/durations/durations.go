// Package durations is what the benchmarks say of the times that they have measured.
package durations

import (
	"fmt"
	"slices"
	"time"
)

// Quantile is what so many percent of the samples do not exceed.
func Quantile(samples []time.Duration, percent int) time.Duration {
	sorted := slices.Sorted(slices.Values(samples))
	return sorted[min(len(sorted)-1, len(sorted)*percent/100)]
}

// Ratio is how many times b a is.
func Ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }

// Milliseconds writes a duration for a table.
func Milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.2f ms", float64(d.Microseconds())/1000)
}
