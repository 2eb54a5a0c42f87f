package driver

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// CentralNode answers the one question about the nodes that external-resizer asks the socket of a central controller: whether volumes grow
// there. It exits if nobody answers.
type CentralNode struct {
	csi.UnimplementedNodeServer
}

// NodeGetCapabilities returns what the controller side needs to know of the drivers on the nodes.
func (CentralNode) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	return &csi.NodeGetCapabilitiesResponse{Capabilities: []*csi.NodeServiceCapability{{
		Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: csi.NodeServiceCapability_RPC_EXPAND_VOLUME}},
	}}}, nil
}
