package store

// Keys of log messages.
const (
	keyBytes     = "bytes"
	keyDigest    = "digest"
	keyDirectory = "directory"
	keyDuration  = "duration"
	keyFile      = "file"
	keyImage     = "image"
	keyLayer     = "layer"
	keyLayers    = "layers"
	keyProgress  = "progress"
	keyReason    = "reason"
	keyRequired  = "required"
)
