// Package kubelet knows kubelet's conventions: in which directories it has the volumes of a pod, how to see that one is mounted,
// how to see that a pod is gone, and how a CSI driver registers.
package kubelet
