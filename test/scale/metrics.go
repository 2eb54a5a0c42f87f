package main

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/rest"
)

// sample is what the servers and the played nodes have done up to a moment.
type sample struct {
	at                   time.Time
	etcd, apiserver, own usage
	scheduler            usage
	central              map[string]usage   // by the names of their containers
	metrics              map[string]float64 // of the API server, by name and labels
	events, wire         int64
	relists, throttled   int64
	beats, bookmarks     int64
}

func (c *cluster) sample(ctx context.Context, ownPID int) (sample, error) {
	s := sample{
		at: time.Now(), events: c.counters.events.Load(), wire: c.counters.wire.Load(),
		relists: c.counters.relists.Load(), throttled: c.counters.throttled.Load(), beats: c.counters.beats.Load(),
		bookmarks: c.counters.bookmarks.Load(),
		central:   map[string]usage{},
	}
	var err error
	for _, p := range []struct {
		pid  int
		into *usage
	}{
		{c.etcd.Process.Pid, &s.etcd}, {c.apiserver.Process.Pid, &s.apiserver}, {c.scheduler.Process.Pid, &s.scheduler}, {ownPID, &s.own},
	} {
		if *p.into, err = usageOf(p.pid); err != nil {
			return sample{}, err
		}
	}
	for name, program := range c.central {
		if s.central[name], err = usageOf(program.Process.Pid); err != nil {
			return sample{}, fmt.Errorf("the usage of the %s: %w", name, err)
		}
		if s.central[name].resident == 0 {
			return sample{}, fmt.Errorf("the %s has ended", name)
		}
	}
	s.metrics, err = scrape(ctx, c.config, "/metrics")
	return s, err
}

// scrape reads the metrics that the report needs.
func scrape(ctx context.Context, config *rest.Config, path string) (map[string]float64, error) {
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, config.Host+path, http.NoBody)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("read the metrics: %s", response.Status)
	}
	values := map[string]float64{}
	lines := bufio.NewScanner(response.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		if !slices.ContainsFunc(wanted, func(name string) bool { return strings.HasPrefix(line, name) }) {
			continue
		}
		key, value, ok := cutLast(line, " ")
		if !ok {
			continue
		}
		if values[key], err = strconv.ParseFloat(value, 64); err != nil {
			return nil, fmt.Errorf("metric %s: %w", key, err)
		}
	}
	return values, lines.Err()
}

// wanted are the metrics of the API server that are kept, by the beginning of their lines.
var wanted = []string{
	"apiserver_request_total{", "apiserver_watch_events_total{", "apiserver_watch_events_sizes_sum{", "apiserver_longrunning_requests{",
	"apiserver_resource_objects{", "apiserver_terminated_watchers_total{", "apiserver_storage_size_bytes{",
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// sum adds up a metric over the label values that keep accepts.
func (s sample) sum(name string, keep func(labels map[string]string) bool) float64 {
	total := 0.0
	for key, value := range s.metrics {
		if rest, ok := strings.CutPrefix(key, name+"{"); ok && (keep == nil || keep(parseLabels(strings.TrimSuffix(rest, "}")))) {
			total += value
		}
	}
	return total
}

// by adds up a metric for each value of one label, or of several with a space between them.
func (s sample) by(name string, labels ...string) map[string]float64 {
	totals := map[string]float64{}
	for key, value := range s.metrics {
		rest, ok := strings.CutPrefix(key, name+"{")
		if !ok {
			continue
		}
		parsed := parseLabels(strings.TrimSuffix(rest, "}"))
		var values []string
		for _, label := range labels {
			values = append(values, parsed[label])
		}
		totals[strings.Join(values, " ")] += value
	}
	return totals
}

// parseLabels takes label="value" pairs apart. The values that are looked at have neither commas nor quotes in them.
func parseLabels(text string) map[string]string {
	labels := map[string]string{}
	for pair := range strings.SplitSeq(text, `",`) {
		if name, value, ok := strings.Cut(pair, `="`); ok {
			labels[name] = strings.TrimSuffix(value, `"`)
		}
	}
	return labels
}

// largest returns the n largest of the differences between two maps, the largest first.
func largest(before, after map[string]float64, n int) []string {
	difference := func(key string) float64 { return after[key] - before[key] }
	keys := slices.SortedFunc(maps.Keys(after), func(a, b string) int {
		return int(difference(b) - difference(a))
	})
	return keys[:min(n, len(keys))]
}
