package registry

// Keys of log messages.
const (
	keyLayer    = "layer"
	keyReason   = "reason"
	keyReceived = "received"
	keySize     = "size"
)
