package volume

// Keys of log messages.
const (
	keyVolume  = "volume"
	keyTarget  = "target"
	keyPod     = "pod"
	keyBytes   = "bytes"
	keyBackend = "backend"
	keyReason  = "reason"
	keyStep    = "step"
	keyDigests = "digests"
	keyLayers  = "layers"
	keyDir     = "directory"
)
