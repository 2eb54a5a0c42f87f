package api

import (
	"encoding/json"
	"time"

	"github.com/opencontainers/go-digest"
)

// Layer is a layer of the store.
type Layer struct {
	// DiffID is the digest of the uncompressed tar.
	DiffID digest.Digest `json:"diffID"`
	// Digest and FileName are those of the blob that it was unpacked from. FileName is set only for a file that is not a tar.
	Digest   digest.Digest `json:"digest,omitempty"`
	FileName string        `json:"fileName,omitempty"`
	// Bytes is about what its files take on the disk.
	Bytes    int64     `json:"bytes"`
	Entries  int64     `json:"entries"`
	Created  time.Time `json:"created"`
	LastUsed time.Time `json:"lastUsed"`
	// Volumes are the IDs of the volumes that use it.
	Volumes []string `json:"volumes,omitempty"`
}

// Image is an image, an artifact or an archive whose layers are in the store.
type Image struct {
	// Digest is what a reference resolves to, and Manifest the manifest for this node's platform.
	Digest   digest.Digest `json:"digest"`
	Manifest digest.Digest `json:"manifest,omitempty"`
	Platform string        `json:"platform,omitempty"`
	// Names are the references that led to it.
	Names []string `json:"names"`
	// Layers are in the order of the manifest, the lowest first.
	Layers []ImageLayer `json:"layers"`
	Pulled time.Time    `json:"pulled"`
}

// ImageLayer is a layer of an image. Size is that of the blob in bytes.
type ImageLayer struct {
	DiffID    digest.Digest `json:"diffID"`
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType,omitempty"`
	Size      int64         `json:"size"`
	FileName  string        `json:"fileName,omitempty"`
}

// GCResult lists the layers that a garbage collection removed, or would remove.
type GCResult struct {
	Layers []Layer `json:"layers"`
	Bytes  int64   `json:"bytes"`
	// Caches is the total size of the caches that were removed before layers, in bytes.
	Caches int64 `json:"caches,omitempty"`
	// Unreadable are the IDs of the volumes whose records cannot be read. Layers that may be theirs were left.
	Unreadable []string `json:"unreadable,omitempty"`
}

// Snapshot is a snapshot of a volume on the node.
type Snapshot struct {
	ID string `json:"id"`
	// Volume is the ID of the volume that it was taken of, which may be gone.
	Volume string `json:"volume,omitempty"`
	// SizeBytes is the least size of a volume that is made of it, 0 if that may have none.
	SizeBytes int64     `json:"sizeBytes,omitempty"`
	Created   time.Time `json:"created,omitzero"`
	State     string    `json:"state"`
	// Volumes are the IDs of the volumes that have what it has: its source, if nothing was merged since, and those that were made of it.
	Volumes []string `json:"volumes,omitempty"`
}

// The states of a snapshot. Volumes can be made of one that is ready, and the record of one that is damaged cannot be read.
const (
	SnapshotReady   = "ready"
	SnapshotPending = "pending"
	SnapshotDamaged = "damaged"
)

// Cache is a cache of a namespace.
type Cache struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// Versions is how many frozen uppers its newest version consists of, and Bytes what they take of the disk.
	Versions int       `json:"versions"`
	Bytes    int64     `json:"bytes"`
	LastUsed time.Time `json:"lastUsed"`
	// Volumes are the IDs of the volumes that have one of its frozen uppers.
	Volumes []string `json:"volumes,omitempty"`
}

// Progress is how far a pull is.
type Progress struct {
	Image  string          `json:"image"`
	Layers []LayerProgress `json:"layers"`
}

// LayerProgress is how far a layer is, in bytes of its blob.
type LayerProgress struct {
	Digest   digest.Digest `json:"digest"`
	FileName string        `json:"fileName,omitempty"`
	Size     int64         `json:"size"`
	Done     int64         `json:"done"`
	// Present is set once the layer is in the store. Before that, a layer with Done equal to Size is being unpacked.
	Present bool `json:"present"`
}

// PullEvent is one line of the answer to a pull. The last one has Image or Error.
type PullEvent struct {
	Progress *Progress `json:"progress,omitempty"`
	Image    *Image    `json:"image,omitempty"`
	Error    string    `json:"error,omitempty"`
}

// Change is an entry that differs between a volume's layers and what its pods see.
type Change struct {
	// Path is relative to the root of the volume, "." for the root. RawPath has the bytes of one that is no UTF-8.
	Path    string `json:"path"`
	RawPath []byte `json:"rawPath,omitempty"`
	// Kind is A for an entry that was added, C for one that was changed, D for one that was deleted.
	Kind string `json:"kind"`
	// Mode has the type and the permissions, as fs.FileMode writes them.
	Mode string `json:"mode"`
	// Size is that of a file in bytes.
	Size int64 `json:"size"`
}

// DiffEvent is one line of the answer to a request for the changes of a volume. The last one has End or Error.
type DiffEvent struct {
	Change *Change `json:"change,omitempty"`
	End    bool    `json:"end,omitempty"`
	Error  string  `json:"error,omitempty"`
}

// Trailers of the answer to a request for the layer of a volume: it is complete, or why it is not.
const (
	EndTrailer   = "Overlay-Csi-End"
	ErrorTrailer = "Overlay-Csi-Error"
)

// Volume describes a volume on this node.
type Volume struct {
	ID string `json:"id"`
	// Spec is the specification of the volume, as the driver records it.
	Spec json.RawMessage `json:"spec"`
	// Inline is set for a volume that lives as long as its pod.
	Inline bool `json:"inline,omitempty"`
	// SizeBytes is the size of each of its uppers, and Backend how they are stored.
	SizeBytes int64  `json:"sizeBytes,omitempty"`
	Backend   string `json:"backend,omitempty"`
	// Resolved are the digests that references to images and archives were resolved to, by reference.
	Resolved map[string]digest.Digest `json:"resolved,omitempty"`
	// Layers are the diff IDs of its layers in the store.
	Layers []digest.Digest `json:"layers,omitempty"`
	// Frozen are the paths of its frozen uppers in the data root, the topmost first.
	Frozen       []string      `json:"frozen,omitempty"`
	Publications []Publication `json:"publications"`
	// Conditions are what is wrong with it.
	Conditions []Condition `json:"conditions,omitempty"`
}

// Publication is one target of a volume.
type Publication struct {
	Target  string `json:"target"`
	Pod     Pod    `json:"pod"`
	Mounted bool   `json:"mounted"`
	Options string `json:"options,omitempty"`
	// Data has the directories of the view.
	Data GraphDriverData `json:"data"`
}

// Pod names a pod.
type Pod struct {
	UID       string `json:"uid,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
}

// GraphDriverData are the directories of one overlay. Its keys are those of GraphDriver.Data in docker image inspect, which
// tools know; LowerDir is separated by colons, the topmost directory first.
type GraphDriverData struct {
	LowerDir  string
	UpperDir  string `json:",omitempty"`
	WorkDir   string `json:",omitempty"`
	MergedDir string
}

// Condition is something that is wrong with a volume.
type Condition struct {
	Severity string `json:"severity"`
	// Reason is one word for one fault. Message names where it is and what to do.
	Reason  string `json:"reason"`
	Message string `json:"message"`
}
