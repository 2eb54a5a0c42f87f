package metrics

import (
	"net/http"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/overlay-csi/overlay-csi/pkg/store"
)

// namespace is the first part of all names.
const namespace = "overlay_csi"

// Metrics has the metrics of a process. Its methods may be called concurrently, and take less than a microsecond.
type Metrics struct {
	registry *prometheus.Registry

	rpcs  *prometheus.HistogramVec
	pulls *prometheus.HistogramVec

	pullFailures   *prometheus.CounterVec
	imageRequests  *prometheus.CounterVec
	receivedBytes  prometheus.Counter
	unpackedBytes  prometheus.Counter
	collections    *prometheus.CounterVec
	removedLayers  prometheus.Counter
	collectedBytes *prometheus.CounterVec
}

// New returns the metrics of a process of a version, with those of the Go runtime and of the process itself.
func New(version string) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry()}
	m.registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), newBuildInfo(version))
	m.rpcs = histogram(m, "rpc_duration_seconds", "Time that an RPC took, by method and gRPC code.",
		prometheus.ExponentialBuckets(0.00025, 4, 10), "method", "code")
	return m
}

// newBuildInfo returns a metric that is always 1.
func newBuildInfo(version string) prometheus.Collector {
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: namespace, Name: "build_info", Help: "1, with the version of the driver and of Go.",
		ConstLabels: prometheus.Labels{"version": version, "go_version": runtime.Version()},
	})
	info.Set(1)
	return info
}

// Handler serves the metrics in the formats of Prometheus and OpenMetrics.
func (m *Metrics) Handler() http.Handler {
	// What cannot be collected is missing from the answer, and the rest is there.
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 2})
}

// RPCEnded observes an RPC that has ended. method is its name without the service.
func (m *Metrics) RPCEnded(method, code string, duration time.Duration) {
	m.rpcs.WithLabelValues(method, code).Observe(duration.Seconds())
}

// AddStore adds what a layer store observes. It is called before the store observes anything.
func (m *Metrics) AddStore() {
	m.imageRequests = counter(m, "image_requests_total", "Requests for images: on the node (hit), or pulled (miss).", "result")
	m.pulls = histogram(m, "pull_duration_seconds", "Time that the pull of an image took, by result.",
		prometheus.ExponentialBuckets(0.1, 3, 10), "result")
	m.pullFailures = counter(m, "pull_failures_total", "Pulls that failed, by the kind of error.", "reason")
	m.receivedBytes = counter(m, "received_bytes_total", "Bytes of blobs that were received from registries and archives.").WithLabelValues()
	m.unpackedBytes = counter(m, "unpacked_bytes_total", "Bytes of blobs that were decompressed and unpacked.").WithLabelValues()
	m.collections = counter(m, "collections_total", "Runs of garbage collection, by result.", "result")
	m.removedLayers = counter(m, "collected_layers_total", "Layers that garbage collection removed.").WithLabelValues()
	m.collectedBytes = counter(m, "collected_bytes_total", "Bytes that garbage collection removed, by kind of what had them.", "kind")
	for _, result := range []string{resultHit, resultMiss} {
		m.imageRequests.WithLabelValues(result)
	}
	for _, result := range []string{resultOK, resultError} {
		m.pulls.WithLabelValues(result)
		m.collections.WithLabelValues(result)
	}
	for _, reason := range reasons {
		m.pullFailures.WithLabelValues(reason.name)
	}
	for _, kind := range []string{kindLayers, kindDownloads, kindCaches} {
		m.collectedBytes.WithLabelValues(kind)
	}
}

// Values of labels.
const (
	resultHit   = "hit"
	resultMiss  = "miss"
	resultOK    = "ok"
	resultError = "error"

	kindLayers    = "layers"
	kindDownloads = "downloads"
	kindCaches    = "caches"
)

// reasons are the kinds of errors of a pull. The last one is for all others.
var reasons = []struct {
	name string
	is   func(error) bool
}{
	{"unauthenticated", errdefs.IsUnauthorized},
	{"denied", errdefs.IsPermissionDenied},
	{"not-found", errdefs.IsNotFound},
	{"no-space", errdefs.IsResourceExhausted},
	{"unavailable", errdefs.IsUnavailable},
	{"invalid", isInvalid},
	{"internal", func(error) bool { return true }},
}

func isInvalid(err error) bool {
	return errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err) || errdefs.IsDataLoss(err)
}

func reasonOf(err error) string {
	for _, reason := range reasons {
		if reason.is(err) {
			return reason.name
		}
	}
	return ""
}

// ImageRequested observes a request for an image, which is on the node or has to be pulled.
func (m *Metrics) ImageRequested(present bool) {
	result := resultMiss
	if present {
		result = resultHit
	}
	m.imageRequests.WithLabelValues(result).Inc()
}

// PullEnded observes the end of the pull of an image.
func (m *Metrics) PullEnded(duration time.Duration, err error) {
	if err == nil {
		m.pulls.WithLabelValues(resultOK).Observe(duration.Seconds())
		return
	}
	m.pulls.WithLabelValues(resultError).Observe(duration.Seconds())
	m.pullFailures.WithLabelValues(reasonOf(err)).Inc()
}

// LayerFetched observes the fetch of a layer, or of a part of it, with the bytes of its blob that were received and unpacked.
func (m *Metrics) LayerFetched(received, unpacked int64) {
	m.receivedBytes.Add(float64(received))
	m.unpackedBytes.Add(float64(unpacked))
}

// Collected observes a run of garbage collection.
func (m *Metrics) Collected(removed store.GCResult, err error) {
	result := resultOK
	if err != nil {
		result = resultError
	}
	m.collections.WithLabelValues(result).Inc()
	m.removedLayers.Add(float64(len(removed.Layers)))
	m.collectedBytes.WithLabelValues(kindLayers).Add(float64(removed.Bytes))
	m.collectedBytes.WithLabelValues(kindDownloads).Add(float64(removed.Downloads))
	m.collectedBytes.WithLabelValues(kindCaches).Add(float64(removed.Caches))
}

func counter(m *Metrics, name, help string, labels ...string) *prometheus.CounterVec {
	vec := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, labels)
	m.registry.MustRegister(vec)
	return vec
}

func histogram(m *Metrics, name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	vec := prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: namespace, Name: name, Help: help, Buckets: buckets}, labels)
	m.registry.MustRegister(vec)
	return vec
}
