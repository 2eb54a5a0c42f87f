// Package store is the node's layer store: it pulls the layers of images from registries or reads them from archives,
// verifies them, unpacks each once for its diff ID, and removes them when no volume uses them.
//
// A Store hands out Leases. A Lease holds the layers of one image, open and safe from garbage collection, until it is
// released. Pull and Import return one after they have brought missing layers to the node; Acquire returns one only of an
// image that is present. Layers in use by volumes are not leased: garbage collection reads them from the volumes' records.
//
// A pull goes on after the request that began it has ended, and other requests for the same image join it. The parts are:
//
//   - catalogue: which layers and images are present, on disk and in memory, and who has leased them
//   - puller: the pulls in progress, one for each image and set of credentials
//   - fetcher: the layers in progress, one for each blob, whoever pulls them
//   - builder: unpacks, verifies and commits one layer
//   - collector: garbage collection
//
// The comment on layout describes the directories of the store.
package store
