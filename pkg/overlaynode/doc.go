// Package overlaynode carries requests from a central controller to the drivers of nodes, and their answers back, by way of the API
// server.
//
// Each node's driver has one object of the kind OverlayNode, which its [Agent] makes and watches by its name. The [Dispatcher] of the
// controller writes requests into its spec, and the agent writes results into its status. A request is stored under the handle of the
// volume that it is about, so that each volume has at most one. Requests may be carried out more than once: after a crash, and where two
// controllers are active for a moment.
//
// What a request says is not this package's business. Its bodies are JSON, and its results have the codes of the caller.
package overlaynode
