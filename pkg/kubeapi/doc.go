// Package kubeapi asks the API server for what the driver needs to know of pods and claims.
//
// The driver needs the API server for five things: to find the volumes of a pod that belong to claims, which kubelet stores under
// the names of their PersistentVolumes, to know after a reboot whether an emptyDir is in memory, to read the annotation in which a
// claim names its layers, to know whether a pod has succeeded, of which a volume is to become a version of a cache, and to find the
// node of a volume that another one is cloned from. It works without one for everything else. [None] then takes the place of a
// [Client], and its errors say what to configure.
package kubeapi
