// Package metrics is what the driver tells Prometheus: what its parts observe while they work ([Metrics] has a method for each), and
// what there is on the node at each scrape ([Node]).
//
// Names and units follow Prometheus' conventions. No label has a value that a pod, an image or a registry chooses: the number of series
// does not grow with what is on the node. docs/metrics.md is made from this package (make docs).
package metrics
