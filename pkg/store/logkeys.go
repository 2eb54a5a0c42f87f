package store

// Keys of log messages.
const (
	keyAvailable = "available"
	keyBytes     = "bytes"
	keyDigest    = "digest"
	keyDirectory = "directory"
	keyDuration  = "duration"
	keyFile      = "file"
	keyImage     = "image"
	keyLayers    = "layers"
	keyProgress  = "progress"
	keyReason    = "reason"
	keyRequired  = "required"
)
