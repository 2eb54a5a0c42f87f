// Package distribution has CNCF Distribution, the registry that most others are built on, for tests of pushes. It knows which repository
// has which blob, mounts blobs from one repository to another, and takes uploads in parts.
package distribution

import (
	"context"
	"io"
	"net/http"

	"github.com/containerd/log"
	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	// The storage is in memory.
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
)

// New returns a registry for registrytest.Options.Handler. It permits deletions if deletable is set.
func New(ctx context.Context, deletable bool) http.Handler {
	config := &configuration.Configuration{
		Storage: configuration.Storage{
			"inmemory": configuration.Parameters{}, "delete": configuration.Parameters{"enabled": deletable},
			"maintenance": configuration.Parameters{"uploadpurging": map[any]any{"enabled": false}},
		},
	}
	config.HTTP.Secret = "test"
	config.HTTP.RelativeURLs = true
	config.Log.AccessLog.Disabled = true
	config.Log.Level = "panic"
	config.Catalog.MaxEntries = 1000
	log.L.Logger.SetOutput(io.Discard)
	return handlers.NewApp(ctx, config)
}
