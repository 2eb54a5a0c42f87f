// Package commit makes an image of what was written to a volume: it pushes the image to a registry, or writes it as an OCI archive.
//
// Where the layers of the volume are one image, the result is that image with one layer more, which every container runtime runs. Its
// layers are taken over from the repository of that image if both are in one registry, and else copied. Of other volumes, the image has
// what was written alone, and the annotation compose.AnnotationLayers names what belongs below it.
package commit
