package store_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestAttributesNeedNoSlot: a layer of attributes is not downloaded, and waits for no download.
func TestAttributesNeedNoSlot(t *testing.T) {
	n := newNode(t, func(n *node) { n.config.MaxConcurrentLayerPulls, n.registry.StallTimeout = 1, time.Minute })
	r, slow := n.startRegistry(registrytest.Options{}), n.startRegistry(registrytest.Options{})
	for i, l := range privateLayers(t) {
		n.pullUnused(push(t, r, fmt.Sprintf("single/%d:1", i), image(t, l)))
	}
	large, l := random(t, "large", 8<<20)
	halfway, release := stopHalfway(t, slow, l)
	defer release()
	var others sync.WaitGroup
	defer others.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pinned := push(t, slow, "large:1", large)
	others.Go(func() { _, _ = n.pullWith(ctx, pinned) })
	<-halfway
	ctx, cancel = context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	lease, err := n.pullWith(ctx, push(t, r, "a:1", image(t, privateLayers(t)...)))
	must(t, err)
	defer lease.Release()
	if len(lease.Image.Layers) != 3 {
		t.Errorf("the image has %d layers", len(lease.Image.Layers))
	}
}
