// Command overlayctl shows an operator the layers and volumes that the driver has on a node, pulls images and collects
// unused layers.
package main
