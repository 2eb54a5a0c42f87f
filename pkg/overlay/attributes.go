package overlay

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Attributes are the attributes of the mount of a view (mount_setattr(2), MOUNT_ATTR_*).
type Attributes struct {
	ReadOnly    bool `json:"readOnly,omitempty"`
	NoSUID      bool `json:"noSUID,omitempty"`
	NoDev       bool `json:"noDev,omitempty"`
	NoExec      bool `json:"noExec,omitempty"`
	NoSymFollow bool `json:"noSymFollow,omitempty"`
	NoDirATime  bool `json:"noDirATime,omitempty"`
	// ATime is "noatime", "strictatime", or "" for the kernel's default, relatime.
	ATime string `json:"atime,omitempty"`
}

// mountOptions are the options that a volume may name. Those that loosen a default are refused unless the operator allows them.
var mountOptions = map[string]struct {
	loosens bool
	set     func(*Attributes)
}{
	"ro":          {set: func(a *Attributes) { a.ReadOnly = true }},
	"rw":          {set: func(*Attributes) {}},
	"nosuid":      {set: func(a *Attributes) { a.NoSUID = true }},
	"nodev":       {set: func(a *Attributes) { a.NoDev = true }},
	"noexec":      {set: func(a *Attributes) { a.NoExec = true }},
	"nosymfollow": {set: func(a *Attributes) { a.NoSymFollow = true }},
	"nodiratime":  {set: func(a *Attributes) { a.NoDirATime = true }},
	"noatime":     {set: func(a *Attributes) { a.ATime = "noatime" }},
	"relatime":    {set: func(a *Attributes) { a.ATime = "" }},
	"strictatime": {set: func(a *Attributes) { a.ATime = "strictatime" }},
	"suid":        {loosens: true, set: func(a *Attributes) { a.NoSUID = false }},
	"dev":         {loosens: true, set: func(a *Attributes) { a.NoDev = false }},
}

// ParseMountOptions parses a volume's mount options (mount(8), "filesystem-independent mount options"). Layers are untrusted, so nosuid
// and nodev are the default; "suid" and "dev" remove them if allowed has them. It returns ErrInvalidArgument for any other option.
func ParseMountOptions(options, allowed []string) (Attributes, error) {
	attributes := Attributes{NoSUID: true, NoDev: true}
	for _, name := range options {
		option, known := mountOptions[name]
		switch {
		case !known:
			return Attributes{}, fmt.Errorf("%w: mount option %q: allowed are %s",
				errdefs.ErrInvalidArgument, name, strings.Join(allowedOptions(allowed), ", "))
		case option.loosens && !slices.Contains(allowed, name):
			return Attributes{}, fmt.Errorf("%w: mount option %q: layers are untrusted, only the operator can allow it (--allow-mount-option=%s)",
				errdefs.ErrInvalidArgument, name, name)
		}
		option.set(&attributes)
	}
	return attributes, nil
}

// LooseningOptions returns the mount options that a volume may name only if the operator allows them, sorted.
func LooseningOptions() []string {
	var names []string
	for name, option := range mountOptions {
		if option.loosens {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func allowedOptions(allowed []string) []string {
	var names []string
	for name, option := range mountOptions {
		if !option.loosens || slices.Contains(allowed, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// bits returns the attributes as MOUNT_ATTR_* flags.
func (a Attributes) bits() uint64 {
	var bits uint64 = linux.MountAttrRelATime
	for _, flag := range []struct {
		on  bool
		bit uint64
	}{
		{a.ReadOnly, linux.MountAttrReadOnly},
		{a.NoSUID, linux.MountAttrNoSUID},
		{a.NoDev, linux.MountAttrNoDev},
		{a.NoExec, linux.MountAttrNoExec},
		{a.NoSymFollow, linux.MountAttrNoSymFollow},
		{a.NoDirATime, linux.MountAttrNoDirATime},
		{a.ATime == "noatime", linux.MountAttrNoATime},
		{a.ATime == "strictatime", linux.MountAttrStrictATime},
	} {
		if flag.on {
			bits |= flag.bit
		}
	}
	return bits
}

// String returns the attributes as mount(8) spells them, separated by commas.
func (a Attributes) String() string { return strings.Join(a.options(), ",") }

// options returns the attributes as mount(8) spells them.
func (a Attributes) options() []string {
	var names []string
	for _, flag := range []struct {
		on   bool
		name string
	}{
		{a.ReadOnly, "ro"},
		{a.NoSUID, "nosuid"},
		{a.NoDev, "nodev"},
		{a.NoExec, "noexec"},
		{a.NoSymFollow, "nosymfollow"},
		{a.NoDirATime, "nodiratime"},
		{a.ATime != "", a.ATime},
	} {
		if flag.on {
			names = append(names, flag.name)
		}
	}
	return names
}
