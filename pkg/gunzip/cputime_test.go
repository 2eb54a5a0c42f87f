package gunzip

import (
	"syscall"
	"testing"
	"time"
)

// cpuTime returns what this process and those that it has waited for have taken.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var sum time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var usage syscall.Rusage
		if err := syscall.Getrusage(who, &usage); err != nil {
			b.Fatal(err)
		}
		for _, part := range []syscall.Timeval{usage.Utime, usage.Stime} {
			sum += time.Duration(part.Nano())
		}
	}
	return sum
}
