// Package cache has the caches of a node. A cache belongs to a namespace of the cluster. Its newest version is a list of frozen uppers,
// each of what one pod wrote: an inline volume becomes a version of it when its pod has succeeded, and other volumes of the namespace have
// it for a layer.
//
// A cache may be lost at any time. It never holds up a pod, and what is damaged or missing of it counts as no cache.
package cache
