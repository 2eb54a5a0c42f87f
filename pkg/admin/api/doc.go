// Package api is the interface between overlayctl and a running driver: the JSON form of what the driver answers, and the
// client that asks. It imports neither the layer store nor the volumes, so that overlayctl stays small.
package api
