package overlay

import (
	"fmt"
	"slices"
	"strings"
)

// Features are the kernel features that the driver can do without. Those that it needs are checked by [Probe].
type Features struct {
	MountAPI      bool
	LayerFD       bool
	StatMount     bool
	DetachedLayer bool
	IDMappedUpper bool
	// NoNamespaces is set if it is not known whether the kernel has IDMappedUpper: the node allowed no user namespace to try it.
	NoNamespaces bool
}

// Feature describes a kernel feature.
type Feature struct {
	// Name is the feature's name in flags and logs.
	Name string
	// Since is the first version of Linux that has the feature.
	Since string
	// What is what the kernel can do.
	What string
	// Fallback is what the driver does without the feature.
	Fallback string
	// Needs are the features that this one is of no use without.
	Needs []string

	probe func(*prober) error
	field func(*Features) *bool
}

// kernelFeatures are all features, the newest first. The table in docs/operations.md is made from it (make docs).
var kernelFeatures = []Feature{
	{
		Name: "detached-layer", Since: "6.15", Needs: []string{"layer-fd"},
		What: "overlayfs takes directories on mounts that are in no namespace",
		Fallback: "layers and uppers are taken on the mounts that they are on: publish latency grows with the number of mounts there; " +
			"ID-mapped layers are attached in the data root while a view is mounted",
		probe: (*prober).detachedLayer,
		field: func(f *Features) *bool { return &f.DetachedLayer },
	},
	{
		Name: "layer-fd", Since: "6.13", Needs: []string{"mount-api"},
		What:     "overlayfs takes directories by descriptor (FSCONFIG_SET_FD)",
		Fallback: "directories are named by their paths in `/proc/self/fd`",
		probe:    (*prober).layerFD,
		field:    func(f *Features) *bool { return &f.LayerFD },
	},
	{
		Name: "statmount", Since: "6.8",
		What:     "statmount(2) reports the file system of a mount without asking the file system",
		Fallback: "the file system is asked (statfs(2)): one that does not answer delays the driver",
		probe:    (*prober).statMount,
		field:    func(f *Features) *bool { return &f.StatMount },
	},
	{
		Name: "mount-api", Since: "6.7",
		What:     "overlayfs takes its lower directories one by one (fsconfig(2), `lowerdir+`)",
		Fallback: "views are mounted by mount(8), which has to be installed and takes 2 ms more",
		probe:    (*prober).mountAPI,
		field:    func(f *Features) *bool { return &f.MountAPI },
	},
	{
		Name: "id-mapped-upper", Since: "5.19",
		What: "overlayfs takes an upper on an ID-mapped mount",
		Fallback: "where a pod has another `fsGroup` than the pod before it, the driver goes over all files of the upper, " +
			"as kubelet does with other volumes",
		probe: (*prober).idMappedUpper,
		field: func(f *Features) *bool { return &f.IDMappedUpper },
	},
}

// KernelFeatures returns all features, the newest first.
func KernelFeatures() []Feature { return slices.Clone(kernelFeatures) }

// FeatureNames returns the names of all features, sorted.
func FeatureNames() []string {
	var names []string
	for _, feature := range kernelFeatures {
		names = append(names, feature.Name)
	}
	slices.Sort(names)
	return names
}

// Fallbacks returns, for each feature that is missing, what the driver does instead.
func (f Features) Fallbacks() []string {
	var fallbacks []string
	for _, feature := range kernelFeatures {
		switch {
		case *feature.field(&f):
		case f.NoNamespaces && feature.field(&f) == &f.IDMappedUpper:
			fallbacks = append(fallbacks, fmt.Sprintf("no %s (%s and start the driver again): %s", feature.Name, errNoNamespace, feature.Fallback))
		default:
			fallbacks = append(fallbacks, fmt.Sprintf("no %s: %s", feature.Name, feature.Fallback))
		}
	}
	return fallbacks
}

// Without returns the features less those named and those that need them, so that the fallbacks can be tried on any kernel. It
// returns an error for an unknown name.
func (f Features) Without(names ...string) (Features, error) {
	for _, name := range names {
		i := slices.IndexFunc(kernelFeatures, func(feature Feature) bool { return feature.Name == name })
		if i < 0 {
			return Features{}, fmt.Errorf("unknown kernel feature %q; known are %s", name, strings.Join(FeatureNames(), ", "))
		}
		*kernelFeatures[i].field(&f) = false
	}
	// The older ones, which others need, come last in the table.
	for _, feature := range slices.Backward(kernelFeatures) {
		if !f.has(feature.Needs) {
			*feature.field(&f) = false
		}
	}
	return f, nil
}

func (f Features) has(names []string) bool {
	for _, feature := range kernelFeatures {
		if slices.Contains(names, feature.Name) && !*feature.field(&f) {
			return false
		}
	}
	return true
}

// Has reports whether the kernel has a feature, which is named as in [FeatureNames].
func (f Features) Has(name string) bool { return f.has([]string{name}) }

// String names the features that the kernel has.
func (f Features) String() string {
	var names []string
	for _, feature := range kernelFeatures {
		if *feature.field(&f) {
			names = append(names, feature.Name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, ",")
}
