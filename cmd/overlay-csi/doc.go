// Command overlay-csi is the node plugin of a CSI driver for overlay volumes. It parses flags, creates
// the objects of the packages in pkg/, and serves kubelet until it gets SIGTERM or SIGINT.
package main
