// Command overlay-csi is the node plugin of a CSI driver for overlay volumes. It parses flags, makes the objects of the
// packages below pkg/, one on top of the other, and serves kubelet until it is told to stop.
package main
