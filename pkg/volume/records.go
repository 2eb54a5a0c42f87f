package volume

import (
	"path/filepath"

	"github.com/opencontainers/go-digest"
)

// Records are the records of the volumes in a data root. The layer store reads them to know what is in use.
type Records struct{ states states }

// NewRecords returns the records in a data root.
func NewRecords(root *DataRoot) Records {
	return Records{states{filepath.Join(root.Path(), volumesName)}}
}

// LayersInUse returns the IDs of the volumes that use each of the layers in the layer store.
func (r Records) LayersInUse() (map[digest.Digest][]string, error) {
	return (&Manager{states: r.states}).LayerUsers()
}
