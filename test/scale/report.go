package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// result is one row of the report: one churn with so many nodes.
type result struct {
	nodes         int
	rate          float64
	before, after sample
	p50, p99      time.Duration
	bound         int
	waiting       int
	skipped       int64
	note          string
}

func (r result) seconds() float64 { return r.after.at.Sub(r.before.at).Seconds() }

func (r result) perSecond(name string, keep func(map[string]string) bool) float64 {
	return (r.after.sum(name, keep) - r.before.sum(name, keep)) / r.seconds()
}

var writes = []string{"POST", "PUT", "PATCH", "DELETE", "APPLY"}

func isWrite(labels map[string]string) bool { return slices.Contains(writes, labels["verb"]) }
func isRead(labels map[string]string) bool {
	return !isWrite(labels) && labels["verb"] != "WATCH" && labels["verb"] != "CONNECT"
}

func mib(bytes float64) string { return fmt.Sprintf("%.0f MiB", bytes/(1<<20)) }

func count(n float64) string {
	if n < 100 {
		return fmt.Sprintf("%.1f", n)
	}
	return fmt.Sprintf("%.0f", n)
}

func milliseconds(d time.Duration) string {
	if d >= 10*time.Second {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return fmt.Sprintf("%d ms", d.Milliseconds())
}

// report writes the tables in Markdown.
func report(w io.Writer, results []result) {
	fmt.Fprint(w, "| nodes | claims/s | bound/s | claim to bound p50 | p99 | reads/s | writes/s | watches | watch events/s | their MiB/s |\n",
		"| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, r := range results {
		watching := func(labels map[string]string) bool { return labels["verb"] == "WATCH" }
		fmt.Fprintf(w, "| %d | %g | %.1f | %s | %s | %s | %s | %.0f | %s | %.2f |\n", r.nodes, r.rate, float64(r.bound)/r.seconds(),
			milliseconds(r.p50), milliseconds(r.p99), count(r.perSecond("apiserver_request_total", isRead)),
			count(r.perSecond("apiserver_request_total", isWrite)), r.after.sum("apiserver_longrunning_requests", watching),
			count(r.perSecond("apiserver_watch_events_total", nil)),
			r.perSecond("apiserver_watch_events_sizes_sum", nil)/(1<<20))
	}
	fmt.Fprint(w, "\n| nodes | claims/s | API server CPU | memory | etcd CPU | memory | database | objects | volumes | ",
		"scheduler's CPU | central sidecars' CPU | memory | test's own CPU | memory |\n",
		"| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, r := range results {
		cores := func(before, after usage) string { return fmt.Sprintf("%.2f", (after.cpu-before.cpu)/r.seconds()) }
		volumes := func(labels map[string]string) bool { return labels["resource"] == "persistentvolumes" }
		fmt.Fprintf(w, "| %d | %g | %s | %s | %s | %s | %s | %.0f | %.0f | %s | %s | %s | %s | %s |\n", r.nodes, r.rate,
			cores(r.before.apiserver, r.after.apiserver), mib(float64(r.after.apiserver.resident)),
			cores(r.before.etcd, r.after.etcd), mib(float64(r.after.etcd.resident)), mib(r.after.sum("apiserver_storage_size_bytes", nil)),
			r.after.sum("apiserver_resource_objects", nil), r.after.sum("apiserver_resource_objects", volumes),
			cores(r.before.scheduler, r.after.scheduler), cores(r.before.sidecars, r.after.sidecars), mib(float64(r.after.sidecars.resident)),
			cores(r.before.own, r.after.own), mib(float64(r.after.own.resident)))
	}
	fmt.Fprintln(w)
	for _, r := range results {
		if note := r.remarks(); note != "" {
			fmt.Fprintf(w, "- %d nodes, %g claims/s: %s\n", r.nodes, r.rate, note)
		}
	}
	if len(results) > 0 {
		details(w, results[len(results)-1])
	}
}

// remarks says where a row is not what was asked for.
func (r result) remarks() string {
	var notes []string
	if r.note != "" {
		notes = append(notes, r.note)
	}
	if r.waiting > 0 && float64(r.waiting) > r.rate {
		notes = append(notes, fmt.Sprintf("%d claims still waited at the end", r.waiting))
	}
	if r.skipped > 0 {
		notes = append(notes, fmt.Sprintf("%d claims were not made, since 3,000 were under way", r.skipped))
	}
	if n := r.after.sum("apiserver_terminated_watchers_total", nil) - r.before.sum("apiserver_terminated_watchers_total", nil); n > 0 {
		notes = append(notes, fmt.Sprintf("the API server ended %.0f watches that did not keep up", n))
	}
	if n := r.after.relists - r.before.relists; n > 0 {
		notes = append(notes, fmt.Sprintf("%d informers started from the beginning", n))
	}
	if n := r.after.throttled - r.before.throttled; n > 0 {
		notes = append(notes, fmt.Sprintf("%d requests were answered with 429", n))
	}
	return strings.Join(notes, ", ")
}

// details shows what the requests and the events of the last row are of.
func details(w io.Writer, r result) {
	const n = 12
	fmt.Fprintf(w, "\nOf %d nodes with %g claims/s, the most frequent:\n\n| request | in a second |\n| --- | ---: |\n", r.nodes, r.rate)
	requests := func(s sample) map[string]float64 {
		return s.by("apiserver_request_total", "verb", "resource", "subresource")
	}
	before, after := requests(r.before), requests(r.after)
	maps.DeleteFunc(after, func(key string, _ float64) bool { return strings.HasPrefix(key, "WATCH ") })
	for _, key := range largest(before, after, n) {
		fmt.Fprintf(w, "| %s | %s |\n", strings.TrimSpace(key), count((after[key]-before[key])/r.seconds()))
	}
	fmt.Fprint(w, "\n| watch events of | in a second |\n| --- | ---: |\n")
	before, after = r.before.by("apiserver_watch_events_total", "resource"), r.after.by("apiserver_watch_events_total", "resource")
	for _, key := range largest(before, after, 6) {
		if after[key] > before[key] {
			fmt.Fprintf(w, "| %s | %s |\n", key, count((after[key]-before[key])/r.seconds()))
		}
	}
}
