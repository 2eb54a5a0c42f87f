package image

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

const (
	// ollamaTypes is the prefix of the media types of Ollama's blobs, which are files. The rest is what the file is.
	ollamaTypes = "application/vnd.ollama.image."
	// encryptedSuffix ends the media type of an encrypted layer (containers/ocicrypt).
	encryptedSuffix = "+encrypted"
)

// modelTypes are the prefixes of the media types of the CNCF ModelPack specification, and of its former name. They contain ".tar" if the
// blob is a tar.
var modelTypes = []string{"application/vnd.cncf.model.", "application/vnd.cnai.model."}

// ollamaSuffixes are the suffixes of the names of Ollama's files. Others have none.
var ollamaSuffixes = map[string]string{
	"model": ".gguf", "projector": ".gguf", "adapter": ".gguf", "params": ".json", "messages": ".json",
}

// nameOllama sets the name of a file of Ollama: model.gguf, and model-2.gguf for the next one. earlier are the layers before it.
func (b *LayerBlob) nameOllama(earlier []LayerBlob) {
	kind := strings.TrimPrefix(b.Descriptor.MediaType, ollamaTypes)
	count := 1
	for _, other := range earlier {
		if other.Descriptor.MediaType == b.Descriptor.MediaType {
			count++
		}
	}
	name := kind
	if count > 1 {
		name = fmt.Sprintf("%s-%d", kind, count)
	}
	b.format, b.FileName = fileFormat, name+ollamaSuffixes[kind]
}

// setName sets the format and the file name of the blob of an artifact.
func (b *LayerBlob) setName(names annotations) error {
	mediaType := b.Descriptor.MediaType
	isModel := slices.ContainsFunc(modelTypes, func(prefix string) bool { return strings.HasPrefix(mediaType, prefix) })
	name := cmp.Or(names.ModelPath, names.CNAIPath, names.Title)
	switch {
	case names.OrasUnpack == "true", isModel && strings.Contains(mediaType, ".tar"):
		b.format = tarFormat
	case name != "":
		b.format, b.FileName = fileFormat, name
	default:
		b.format = unknownFormat
	}
	return checkFileName(b.FileName)
}

const (
	// maxNameLength is the maximum length of a file name in bytes (NAME_MAX).
	maxNameLength = 255
	// maxPathLength is the maximum length of a path in bytes (PATH_MAX less the final NUL).
	maxPathLength = 4095
)

// checkFileName returns an error if name is not valid for a file in a layer, for example because it is a whiteout. It does
// not check links, which the unpacker resolves.
func checkFileName(name string) error {
	if name == "" {
		return nil
	}
	if len(name) > maxPathLength {
		return fmt.Errorf("%w: the artifact has a file name of %d bytes; the maximum is %d", errdefs.ErrInvalidArgument, len(name), maxPathLength)
	}
	for component := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		isSpecial := component == "" || component == "." || component == ".." || strings.HasPrefix(component, unpack.WhiteoutPrefix)
		if isSpecial || len(component) > maxNameLength || strings.ContainsRune(component, 0) {
			return fmt.Errorf("%w: the artifact has the invalid file name %q", errdefs.ErrInvalidArgument, truncate(name))
		}
	}
	return nil
}
