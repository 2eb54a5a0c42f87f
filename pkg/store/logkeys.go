package store

// Keys of log messages.
const (
	keyAvailable = "available"
	keyBytes     = "bytes"
	keyDigest    = "digest"
	keyDirectory = "directory"
	keyDuration  = "duration"
	keyImage     = "image"
	keyLayers    = "layers"
	keyProgress  = "progress"
	keyReason    = "reason"
	keyRequired  = "required"
)
