package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/overlay-csi/overlay-csi/test/bench/durations"
)

const (
	// samples is how often the driver is looked at while claims are made and deleted, at least.
	samples = 10
	// imageEvery is which of the claims has a disk image.
	imageEvery = 10
	// inProgress is how many claims there may be at once: kubelet's limit of pods. Where the machine is too slow for the rate, fewer
	// are begun.
	inProgress = 110
	// settleWait is how long the driver may take until it has given everything back.
	settleWait = 30 * time.Second
)

// round is the life of one claim after the other between two samples.
type round struct {
	mu     sync.Mutex
	cycles series
	failed error
}

// churn makes and deletes claims all the time. It fails if something that must not grow has grown.
func churn(ctx context.Context, b *bench, o options) error {
	fmt.Printf("\n## %d claims a second, for %s\n\n", o.rate, o.churn)
	// What the driver opens and starts once is not growth.
	if err := b.warmUp(ctx); err != nil {
		return err
	}
	before, err := b.read("before")
	if err != nil {
		return err
	}
	columns := []gauges{before}
	fmt.Println("| after | claims | p50 | p99 | resident | descriptors | threads | loop devices | files | mounts |")
	fmt.Println("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
	interval := min(time.Minute, o.churn/samples)
	begin := time.Now()
	for time.Since(begin) < o.churn {
		cycles, err := b.churnFor(ctx, interval, o.rate)
		if err != nil {
			return err
		}
		now, err := b.read("")
		if err != nil {
			return err
		}
		fmt.Printf("| %s | %d | %s | %s | %.1f MiB | %d | %d | %d | %d | %d |\n", time.Since(begin).Round(time.Second), len(cycles),
			durations.Milliseconds(durations.Quantile(cycles, 50)), durations.Milliseconds(durations.Quantile(cycles, 99)),
			float64(now.resident)/(1<<20), now.files, now.threads, now.loops, now.entries, now.mounts)
	}
	if err := errors.Join(b.settle(ctx), b.checkEmpty()); err != nil {
		return err
	}
	after, err := b.readUntilAsBefore(before)
	if err != nil {
		return err
	}
	goroutines, _, err := b.restart(ctx)
	if err != nil {
		return err
	}
	printGauges(append(columns, after)...)
	fmt.Printf("\nThe driver had %d goroutines at its end.\n", goroutines)
	return nil
}

// warmUp takes every path of the driver once, and many at once.
func (b *bench) warmUp(ctx context.Context) error {
	if _, err := b.churnFor(ctx, time.Second, 2*imageEvery); err != nil {
		return err
	}
	return b.settle(ctx)
}

// churnFor makes and deletes claims for a time, and returns how long each life took.
func (b *bench) churnFor(ctx context.Context, d time.Duration, rate int) (series, error) {
	var r round
	var group sync.WaitGroup
	slots := make(chan struct{}, inProgress)
	ticker := time.NewTicker(time.Second / time.Duration(rate))
	defer ticker.Stop()
	end := time.After(d)
	// The names are never the same twice: the provisioner's have a UID.
	prefix := "claim-" + strconv.FormatInt(time.Now().UnixNano(), 36) + "-"
	for i := 0; ; i++ {
		select {
		case <-end:
			group.Wait()
			return r.cycles, r.failed
		case <-ctx.Done():
			group.Wait()
			return nil, ctx.Err()
		case <-ticker.C:
		}
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			begin := time.Now()
			err := b.cycle(ctx, prefix+strconv.Itoa(i), i%imageEvery == 0)
			r.mu.Lock()
			defer r.mu.Unlock()
			r.cycles = append(r.cycles, time.Since(begin))
			r.failed = errors.Join(r.failed, err)
		})
	}
}

// cycle is the life of one claim with one pod.
func (b *bench) cycle(ctx context.Context, name string, image bool) error {
	enforcement := "none"
	if image {
		enforcement = "image"
	}
	volume, err := b.claim(ctx, name, imageBytes, attributes("layers", b.layers, "sizeEnforcement", enforcement))
	if err != nil {
		return err
	}
	v, err := b.newView(volume)
	if err != nil {
		return err
	}
	for _, do := range []func(context.Context, view) error{b.publish, b.stats, b.unpublish} {
		if err := do(ctx, v); err != nil {
			return err
		}
	}
	return errors.Join(b.delete(ctx, volume), os.RemoveAll(v.pod.Dir()))
}

// readUntilAsBefore reads what the driver has until that is not more than before. It returns an error if it stays more.
func (b *bench) readUntilAsBefore(before gauges) (gauges, error) {
	for begin := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		after, err := b.read("after")
		if err != nil {
			return after, err
		}
		grown := ""
		for _, what := range []struct {
			name          string
			before, after int
		}{
			{"descriptors", before.files, after.files},
			{"loop devices", before.loops, after.loops},
			{"files and directories", before.entries, after.entries},
			{"mounts", before.mounts, after.mounts},
		} {
			if what.after > what.before {
				grown += fmt.Sprintf("; %d %s, and %d before", what.after, what.name, what.before)
			}
		}
		if grown == "" {
			return after, nil
		}
		if time.Since(begin) > settleWait {
			return after, errors.New("the driver keeps what it should have given back" + grown)
		}
	}
}
