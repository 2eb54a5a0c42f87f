package metrics

import (
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// scrape returns what /metrics serves.
func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	recorder := httptest.NewRecorder()
	m.Handler().ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if recorder.Code != http.StatusOK {
		t.Fatalf("%d %s", recorder.Code, recorder.Body)
	}
	return recorder.Body.String()
}

// wantLines fails the test unless each of the lines is in what /metrics serves.
func wantLines(t *testing.T, m *Metrics, lines ...string) {
	t.Helper()
	served := scrape(t, m)
	for _, line := range lines {
		if !strings.Contains(served, "\n"+line+"\n") {
			t.Errorf("no line %s in\n%s", line, served)
		}
	}
}

func TestMetrics(t *testing.T) {
	m := New("1.2.3")
	m.AddStore()
	wantLines(t, m, `overlay_csi_pull_failures_total{reason="denied"} 0`, `overlay_csi_image_requests_total{result="hit"} 0`)

	m.RPCEnded("NodePublishVolume", "OK", time.Millisecond)
	m.RPCEnded("NodePublishVolume", "OK", time.Minute)
	m.RPCEnded("CreateVolume", "ResourceExhausted", time.Second)
	m.ImageRequested(true)
	m.ImageRequested(false)
	m.PullEnded(2*time.Second, nil)
	m.PullEnded(time.Second, fmt.Errorf("pull: %w", errdefs.ErrPermissionDenied))
	m.PullEnded(time.Second, errors.New("what nobody thought of"))
	m.LayerFetched(10, 20)
	m.LayerFetched(1, 2)
	m.Collected(store.GCResult{Layers: make([]store.LayerStatus, 3), Bytes: 100, Downloads: 10, Caches: 1}, nil)
	m.Collected(store.GCResult{}, errors.New("no records"))
	wantLines(t, m,
		`overlay_csi_rpc_duration_seconds_count{code="OK",method="NodePublishVolume"} 2`,
		`overlay_csi_rpc_duration_seconds_bucket{code="OK",method="NodePublishVolume",le="0.001"} 1`,
		`overlay_csi_rpc_duration_seconds_sum{code="ResourceExhausted",method="CreateVolume"} 1`,
		`overlay_csi_image_requests_total{result="hit"} 1`,
		`overlay_csi_image_requests_total{result="miss"} 1`,
		`overlay_csi_pull_duration_seconds_sum{result="ok"} 2`,
		`overlay_csi_pull_duration_seconds_count{result="error"} 2`,
		`overlay_csi_pull_failures_total{reason="denied"} 1`,
		`overlay_csi_pull_failures_total{reason="internal"} 1`,
		`overlay_csi_received_bytes_total 11`,
		`overlay_csi_unpacked_bytes_total 22`,
		`overlay_csi_collections_total{result="error"} 1`,
		`overlay_csi_collected_layers_total 3`,
		`overlay_csi_collected_bytes_total{kind="caches"} 1`,
	)
}

var update = flag.Bool("update", false, "write docs/metrics.md from the code")

const (
	page       = "../../docs/metrics.md"
	tableBegin = "<!-- Made from pkg/metrics by make docs. -->\n"
	tableEnd   = "<!-- End of what make docs writes. -->\n"
)

// TestMetricsAreDocumented: docs/metrics.md has the table of all metrics that the code has. With -update it writes it.
func TestMetricsAreDocumented(t *testing.T) {
	n := newTestNode(t)
	n.save(t, "a", spec.UpperPod, upper.Directory, 1)
	n.conditions = map[string][]volume.Condition{"a": {{}}}
	n.storage = []volume.Condition{{}}
	n.metrics.RPCEnded("", "", 0)
	n.node.census.take(t.Context())
	families, err := n.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	table := "\n| metric | type | labels | what it is |\n| --- | --- | --- | --- |\n"
	for _, family := range families {
		if !strings.HasPrefix(family.GetName(), namespace) {
			continue
		}
		var labels []string
		for _, label := range family.GetMetric()[0].GetLabel() {
			labels = append(labels, "`"+label.GetName()+"`")
		}
		table += fmt.Sprintf("| `%s` | %s | %s | %s |\n",
			family.GetName(), strings.ToLower(family.GetType().String()), strings.Join(labels, ", "), family.GetHelp())
	}
	table += "\n"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), tableBegin)
	old, after, ended := strings.Cut(rest, tableEnd)
	switch {
	case !ok || !ended:
		t.Fatalf("%s has no table between %q and %q", page, tableBegin, tableEnd)
	case old == table:
	case !*update:
		t.Errorf("the table in %s is not made from the code: run make docs", page)
	default:
		if err := os.WriteFile(page, []byte(before+tableBegin+table+tableEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNames has Prometheus' linter look at names, units and help.
func TestNames(t *testing.T) {
	problems, err := testutil.GatherAndLint(newTestNode(t).metrics.registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range problems {
		if strings.HasPrefix(problem.Metric, namespace) {
			t.Errorf("%+v", promlint.Problem(problem))
		}
	}
}
