// Package compose assembles an image from an existing one and a new layer, or from the layer alone.
//
// NewLayer reads the tar of a layer once, to learn its digests, and reads it again for each copy of the layer that is sent. No copy is on
// the disk. ReadBase reads the manifest and the configuration of the image below. Base.With and Alone return an Image, which WriteArchive
// writes into a file, and which registry.Repository.Push sends. The same tar, base and Details give the same image, byte by byte.
package compose
