// Command overlayctl shows an operator the layers, volumes and caches that the driver has on a node, pulls images and collects
// unused layers. It lists what was written to a volume, and makes an image layer of it.
package main
