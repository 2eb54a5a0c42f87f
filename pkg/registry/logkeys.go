package registry

// Keys of log messages.
const (
	keyBlob     = "blob"
	keyLayer    = "layer"
	keyReason   = "reason"
	keyReceived = "received"
	keySize     = "size"
)
