// Package portable has the snapshots that are images in registries: their handles, the pushes that make them, and what the image of one
// says of the volume that it was.
package portable
