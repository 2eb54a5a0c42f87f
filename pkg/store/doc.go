// Package store is the layer store of a node. It pulls the layers of images from registries or reads them from archives,
// verifies them, and unpacks them. It removes layers when no volume uses them.
//
// A Lease protects the layers of one image from garbage collection, and has them open, until it is released. Pull and Import
// return a Lease after they have added missing layers to the store. Acquire returns a Lease only for an image that is
// present. Volumes do not hold leases. Garbage collection reads the layers in use from the records of the volumes.
//
// A pull continues after the request that started it has ended. Other requests for the same image join it. The parts of the
// store are:
//
//   - catalogue: the layers and images on disk, and the leases on them
//   - puller: the pulls in progress, one for each image and set of credentials, and the disk space that they reserve
//   - fetcher: the layers in progress, one for each blob and source
//   - slots: how many of them may run, and whose turn it is
//   - attributesOrigin: the layer of attributes of an image
//   - builder: unpacks, verifies and commits one layer
//   - collector: garbage collection
//
// The comment in layout.go describes the directories of the store.
package store
