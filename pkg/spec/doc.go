// Package spec describes what a volume consists of, as users write it: its keys, their values and defaults, and the access
// modes. The keys are the same in a StorageClass's parameters, a PersistentVolume's volumeAttributes and an inline volume's
// volumeAttributes.
//
// The package is pure: [Parse] reads nothing but its arguments, and a [Spec] is a value that records and requests carry.
package spec
