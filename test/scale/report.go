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

func (r result) difference(name string, keep func(map[string]string) bool) float64 {
	return r.after.sum(name, keep) - r.before.sum(name, keep)
}

func (r result) perSecond(name string, keep func(map[string]string) bool) float64 {
	return r.difference(name, keep) / r.seconds()
}

// cores returns how many CPUs a process has used.
func (r result) cores(before, after usage) string {
	return fmt.Sprintf("%.2f", (after.cpu-before.cpu)/r.seconds())
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
		"scheduler's CPU | test's own CPU | memory |\n",
		"| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, r := range results {
		volumes := func(labels map[string]string) bool { return labels["resource"] == "persistentvolumes" }
		fmt.Fprintf(w, "| %d | %g | %s | %s | %s | %s | %s | %.0f | %.0f | %s | %s | %s |\n", r.nodes, r.rate,
			r.cores(r.before.apiserver, r.after.apiserver), mib(float64(r.after.apiserver.resident)),
			r.cores(r.before.etcd, r.after.etcd), mib(float64(r.after.etcd.resident)), mib(r.after.sum("apiserver_storage_size_bytes", nil)),
			r.after.sum("apiserver_resource_objects", nil), r.after.sum("apiserver_resource_objects", volumes),
			r.cores(r.before.scheduler, r.after.scheduler), r.cores(r.before.own, r.after.own), mib(float64(r.after.own.resident)))
	}
	if len(results) > 0 && len(results[0].after.central) > 0 {
		reportCentral(w, results)
	}
	reportClaims(w, results)
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

// reportCentral writes what the programs take that run once for the cluster.
func reportCentral(w io.Writer, results []result) {
	names := slices.Sorted(maps.Keys(results[0].after.central))
	fmt.Fprint(w, "\n| nodes | claims/s |")
	for _, name := range names {
		fmt.Fprintf(w, " %s's CPU | memory |", name)
	}
	fmt.Fprintf(w, "\n| ---: | ---: |%s\n", strings.Repeat(" ---: | ---: |", len(names)))
	for _, r := range results {
		fmt.Fprintf(w, "| %d | %g |", r.nodes, r.rate)
		for _, name := range names {
			before, after := r.before.central[name], r.after.central[name]
			fmt.Fprintf(w, " %s | %s |", r.cores(before, after), mib(float64(after.resident)))
		}
		fmt.Fprintln(w)
	}
}

// reportClaims writes what a claim costs the API server from its making to its deletion: all requests and watch events, without those that
// are made without claims, which are leases, CSIStorageCapacity objects, the reports of nodes, and the bookmarks of their watches.
func reportClaims(w io.Writer, results []result) {
	fmt.Fprint(w, "\n| nodes | claims/s | requests per claim | of OverlayNodes | watch events per claim | of OverlayNodes | ",
		"API server's CPU per claim | CSIStorageCapacity writes/s | watch events/s | reports/s | bookmarks/s |\n",
		"| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	const capacities, nodes = "csistoragecapacities", "overlaynodes"
	of := func(names ...string) func(map[string]string) bool {
		return func(labels map[string]string) bool {
			return slices.Contains(names, labels["resource"]) && labels["verb"] != "WATCH"
		}
	}
	for _, r := range results {
		requests := func(keep func(map[string]string) bool) float64 { return r.difference("apiserver_request_total", keep) }
		events := func(keep func(map[string]string) bool) float64 {
			return r.difference("apiserver_watch_events_total", keep)
		}
		isRequest := func(labels map[string]string) bool { return isRead(labels) || isWrite(labels) }
		claims, beats := float64(max(r.bound, 1)), float64(r.after.beats-r.before.beats)
		bookmarks := float64(r.after.bookmarks - r.before.bookmarks)
		fmt.Fprintf(w, "| %d | %g | %.1f | %.2f | %.1f | %.2f | %.0f ms | %s | %s | %s | %s |\n", r.nodes, r.rate,
			(requests(isRequest)-requests(of(capacities, "leases"))-beats)/claims, (requests(of(nodes))-beats)/claims,
			(events(nil)-events(of(capacities, "leases"))-2*beats-bookmarks)/claims, (events(of(nodes))-2*beats-bookmarks)/claims,
			1000*(r.after.apiserver.cpu-r.before.apiserver.cpu)/claims,
			count(r.perSecond("apiserver_request_total", func(labels map[string]string) bool {
				return isWrite(labels) && labels["resource"] == capacities
			})), count(events(of(capacities))/r.seconds()), count(beats/r.seconds()), count(bookmarks/r.seconds()))
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
