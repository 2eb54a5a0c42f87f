// Package chaos tests the real driver by random walks over its RPCs and the kinds of volumes. There are kills, reboots and power cuts,
// full, read-only and failed disks, a registry that misbehaves, and pods that plant links and devices. Snapshots and clones are made of
// claims, and caches of what pods wrote. A model beside the walk says what every view must show. A walk is determined by its seed, except
// for the moments at which the driver is killed:
//
//	go test ./test/chaos -seed 42
package chaos
