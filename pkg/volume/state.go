package volume

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// The data root:
//
//	volumes/<volume handle>/volume.json       the state below
//	volumes/<volume handle>/...               the upper (package upper) of an inline volume, and of a claim with upper: claim
//	volumes/<volume handle>/pods/<pod>/...    those of a claim with upper: pod
//	trash/                                    see trash.go
//
// volume.json is written beside and renamed in, and is there before the upper and the mount that it describes. Of a
// volume whose upper outlives its pods it is on the disk (fsync) before it has its name, so that only the state of an
// ephemeral volume can be found empty after a power cut.
const (
	volumesName   = "volumes"
	stateName     = "volume.json"
	newStateName  = "volume.json.new"
	podUppersName = "pods"
)

// stateVersion is raised when a driver of an earlier version could misread what this one writes.
const stateVersion = 1

// record is the state of one volume on this node.
type record struct {
	Version int       `json:"version"`
	ID      string    `json:"id"`
	Spec    spec.Spec `json:"spec"`
	// Inline: the volume lives as long as its pod.
	Inline bool `json:"inline,omitempty"`
	// Provisioned is set where CreateVolume made the volume, and nil where kubelet brought a static one.
	Provisioned *provisioned `json:"provisioned,omitempty"`
	// Kept is how the volume's uppers are kept, "" as long as there was none. Size is their limit in bytes at present, 0
	// for none: it is Spec's, or what that was grown to.
	Kept upper.Backend `json:"kept,omitempty"`
	Size int64         `json:"sizeBytes,omitempty"`
	// Made: there was a view of the upper that the volume keeps. If that is not there now, it is lost.
	Made bool `json:"made,omitempty"`
	// Pins are the images that the references to images and archives stand for, and Stored the layers of those in the
	// layer store, by diff ID: what is named here is not collected.
	Pins   reference.Digests `json:"pins,omitempty"`
	Stored []digest.Digest   `json:"stored,omitempty"`
	// Publications are the targets where the volume is, is about to be, or was when the node went down: which of them
	// are mounted only the kernel knows.
	Publications []publication `json:"publications,omitempty"`
}

type provisioned struct {
	Name string `json:"name"`
	// Asked are the layers as they were asked for, where their images were pinned since.
	Asked  []reference.Reference `json:"asked,omitempty"`
	Access spec.AccessMode       `json:"access"`
}

// publication is one target of a volume.
type publication struct {
	Target     string             `json:"target"`
	Pod        kubelet.Pod        `json:"pod"`
	Access     spec.AccessMode    `json:"access,omitempty"`
	Attributes overlay.Attributes `json:"attributes"`
	// Group is the pod's fsGroup, nil where it has none.
	Group *uint32 `json:"group,omitempty"`
	// BootID is that of the boot in which it was published.
	BootID string `json:"bootID"`
	// LowerDirs are the directories that the layers were resolved to, the topmost first, and LowerMarks what these looked
	// like.
	LowerDirs  []string            `json:"lowerDirs,omitempty"`
	LowerMarks []linux.Fingerprint `json:"lowerMarks,omitempty"`
	// PodVolume is the directory of the upper if that lies in another volume of the pod.
	PodVolume upper.PodVolumePath `json:"podVolume,omitzero"`
}

// keepsUpper reports whether the volume has an upper that outlives its pods. Its state does too, and must be found whole
// after a power cut.
func (r *record) keepsUpper() bool { return r.Spec.Upper == spec.UpperClaim }

// sharesUpper reports whether all publications of the volume share one upper.
func (r *record) sharesUpper() bool { return r.Spec.Upper == spec.UpperClaim }

// limit is what each upper of the volume may take.
func (r *record) limit() upper.Limit {
	if r.Spec.SizeEnforcement == spec.EnforceNone {
		return upper.Limit{}
	}
	return upper.LimitOf(r.Size)
}

// pins are those of the volume, none of one that is not here yet.
func (r *record) pins() reference.Digests {
	if r == nil {
		return nil
	}
	return r.Pins
}

func (r *record) publication(target string) *publication {
	for i := range r.Publications {
		if r.Publications[i].Target == target {
			return &r.Publications[i]
		}
	}
	return nil
}

// with returns the record with this publication in place of any other of the same target.
func (r *record) with(p publication) *record {
	changed := r.without(p.Target)
	changed.Publications = append(changed.Publications, p)
	return changed
}

func (r *record) without(target string) *record {
	changed := *r
	changed.Publications = nil
	for _, p := range r.Publications {
		if p.Target != target {
			changed.Publications = append(changed.Publications, p)
		}
	}
	return &changed
}

// states keeps the records of a data root.
type states struct{ dir string }

func (s states) volumeDir(id string) string { return filepath.Join(s.dir, id) }

// errTorn says that a state file is empty, which only a power cut during the life of an ephemeral volume leaves.
var errTorn = errors.New("the state file is empty")

// load reads the record of a volume, nil where there is none.
func (s states) load(id string) (*record, error) {
	path := filepath.Join(s.volumeDir(id), stateName)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the state of volume %s: %w", id, err)
	}
	if len(data) == 0 {
		return nil, fmt.Errorf("volume %s: %s: %w", id, path, errTorn)
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("%w: read the state of volume %s: %s is damaged: %w", errdefs.ErrDataLoss, id, path, err)
	}
	if r.Version != stateVersion || r.ID != id {
		return nil, fmt.Errorf("%w: read the state of volume %s: %s is of version %d for volume %q, and this driver reads version %d", errdefs.ErrFailedPrecondition, id, path, r.Version, r.ID, stateVersion)
	}
	return &r, nil
}

// save writes the record, and makes the volume's directory where there is none.
func (s states) save(r *record) error {
	if err := s.write(r); err != nil {
		return fmt.Errorf("write the state of volume %s: %w", r.ID, err)
	}
	return nil
}

func (s states) write(r *record) error {
	r.Version = stateVersion
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	dir := s.volumeDir(r.ID)
	made := false
	if err := os.Mkdir(dir, 0o700); err == nil {
		made = true
	} else if !errors.Is(err, fs.ErrExist) {
		return err
	}
	temporary := filepath.Join(dir, newStateName)
	fd, err := unix.Open(temporary, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: temporary, Err: err}
	}
	file := os.NewFile(uintptr(fd), temporary)
	_, err = file.Write(data)
	if err == nil && r.keepsUpper() {
		err = file.Sync()
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	if err := unix.Rename(temporary, filepath.Join(dir, stateName)); err != nil {
		return &os.PathError{Op: "rename", Path: temporary, Err: err}
	}
	if made && r.keepsUpper() {
		return errors.Join(syncDir(dir), syncDir(s.dir))
	}
	return nil
}

// ids lists the volumes that have a directory, with and without a readable state.
func (s states) ids() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	ids := make([]string, len(entries))
	for i, entry := range entries {
		ids[i] = entry.Name()
	}
	return ids, nil
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// maxID is the longest volume handle in bytes (CSI spec, "Size Limits").
const maxID = 128

// CheckID refuses a volume handle that could not be the name of a directory.
func CheckID(id string) error {
	bad := func(r rune) bool { return r < ' ' || r == '/' || r == '\x7f' || r == '\uFFFD' }
	switch {
	case id == "":
		return fmt.Errorf("%w: the volume ID is missing", errdefs.ErrInvalidArgument)
	case len(id) > maxID:
		return fmt.Errorf("%w: volume ID of %d bytes: at most %d", errdefs.ErrInvalidArgument, len(id), maxID)
	case strings.HasPrefix(id, "."), strings.ContainsFunc(id, bad):
		return fmt.Errorf("%w: volume ID %q: it must not begin with '.' nor have '/' or control characters: set another volumeHandle", errdefs.ErrInvalidArgument, id)
	}
	return nil
}
