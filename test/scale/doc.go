// Command scale shows what the driver costs the control plane of a large cluster: a real etcd, API server and scheduler, the real
// controllers that bind claims, and any number of nodes that are played in this process, against claims and pods that are made and
// deleted at some rate. It prints the tables of docs/scale.md.
//
//	go run ./test/scale                                   # all of it: an hour
//	go run ./test/scale -nodes 100 -rates 1,10 -duration 30s
//
// A played node makes the informers, watches and writes of the programs on one node, over connections of its own, as the
// ServiceAccount of the chart, with the same encodings, selectors, rate limits and intervals. It keeps no objects: a watch event is
// counted and looked through for the node's name, and decoded only if that is in it. So the API server does all that it would do, and
// this process as little as it can.
//
// What the programs ask for is in testdata/node.txt, from the audit log of the real ones, and the played ones are compared with it:
//
//	go run ./test/scale -record >test/scale/testdata/node.txt   # the real driver and sidecars; root
//	go run ./test/scale -compare
//
// With -mode central, the chart is rendered with provisioner.mode=central, and what its Deployment has are the real programs with its
// arguments and rights: `overlay-csi controller`, external-provisioner and external-resizer. Of the driver on each node the part that they
// reach is real, an overlaynode.Agent with a client and a connection of its own. Behind it are no volumes: it remembers their sizes.
//
// The chart is rendered by helm. The servers and sidecars are found by flags, in the PATH, or built from the module in
// test/scale/servers, which takes a quarter of an hour once. That is a module of its own, since Kubernetes and etcd are dependencies of
// nothing else here. external-provisioner has another one, since it needs another version of Kubernetes' modules.
package main
