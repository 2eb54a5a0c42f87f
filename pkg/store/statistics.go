package store

import "time"

// Observer learns what the store does. Its methods are called by many goroutines, some of which hold locks, and do not block.
type Observer interface {
	// ImageRequested is called for each request for an image. It is present, or is being pulled.
	ImageRequested(present bool)
	// PullEnded is called after the pull of an image, which failed if err is not nil.
	PullEnded(duration time.Duration, err error)
	// LayerFetched is called after a layer was fetched, or a part of one, with the bytes of its blob that were received and unpacked.
	LayerFetched(received, unpacked int64)
	// Collected is called after garbage collection has removed something or looked for what to remove.
	Collected(removed GCResult, err error)
}

// unobserved is the Observer of a store without one.
type unobserved struct{}

func (unobserved) ImageRequested(bool)            {}
func (unobserved) PullEnded(time.Duration, error) {}
func (unobserved) LayerFetched(int64, int64)      {}
func (unobserved) Collected(GCResult, error)      {}

// Statistics are the numbers of what is in a store and of what it does.
type Statistics struct {
	// Images and Layers are present, and the layers have LayerBytes.
	Images, Layers int
	LayerBytes     int64
	// LeasedLayers are needed by a publish, a pull or a commit that is under way. The layers of mounted views are not among them.
	LeasedLayers int
	// Pulls are in progress. Fetching layers have a slot, and Waiting ones wait for one.
	Pulls, Fetching, Waiting int
}

// Statistics returns the numbers as they are now. It does not read the disk.
func (s *Store) Statistics() Statistics {
	var now Statistics
	s.puller.mu.Lock()
	now.Pulls = len(s.puller.pulls)
	s.puller.mu.Unlock()
	now.Fetching, now.Waiting = s.puller.fetcher.slots.count()
	s.catalogue.count(&now)
	return now
}

// count adds the numbers of layers, of images whose layers are all present, and of leases.
func (c *catalogue) count(now *Statistics) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now.Layers, now.LeasedLayers = len(c.layers), len(c.leases.counts)
	for _, layer := range c.layers {
		now.LayerBytes += layer.Bytes
	}
	for _, image := range c.images.images {
		if c.hasLayersLocked(image) {
			now.Images++
		}
	}
}
