package volume

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// reservations are what the records of the node's volumes reserve of the disk, in memory: to read all records for each volume that is
// made would take the longer the more there are. They are read from the records once, and follow each record that is saved or discarded,
// which the package does by the methods save, saveDurably and discard alone. Nothing of the reservations is stored: after a crash they are
// what the records say.
type reservations struct {
	records *record.Store
	uppers  uppers
	root    dataRoot

	mu sync.Mutex
	// volumes are those that reserve something, by ID, nil before the records have been read.
	volumes map[string]*reservation
	// unread are those whose records could not be read the last time, by ID. They are read again before more is reserved.
	unread map[string]bool
	// reserved is what they reserve together.
	reserved int64
	// growing has the new size of each volume that is made or is growing, which its record does not say before it is done. What it takes
	// of the disk meanwhile is taken of that size.
	growing map[string]int64
	// held is what will be taken of the disk, and no record reserves: that of frozen uppers that are being made.
	held int64
	// available is what was free on the disk when the uppers were measured, which is good enough for [reservations.recent] until the time
	// in valid.
	available int64
	valid     time.Time
}

// reservation is that of one volume.
type reservation struct {
	id string
	// size is that of each of its uppers.
	size   int64
	uppers []upper.Upper
	// targets identify the uppers.
	targets []string
	// taken is what each of them took of the disk when they were measured, nil before. It may be more than is reserved for it.
	taken []int64
}

func (r *reservation) bytes() int64 { return r.size * int64(len(r.uppers)) }

const (
	// measureFactor is how long a measurement is good enough, as a multiple of the time that it took.
	measureFactor = 20
	// manyVolumes is from how many volumes on that is so. Fewer are measured each time, as for all that reserves.
	manyVolumes = 256
)

func newReservations(config Config, uppers uppers) *reservations {
	return &reservations{records: config.Records, uppers: uppers, root: config.Root, growing: map[string]int64{}}
}

// save saves a record, as [record.Store.Save].
func (v *reservations) save(r *record.Record) error { return v.follow(r, v.records.Save(r)) }

// saveDurably saves a record, as [record.Store.SaveDurably].
func (v *reservations) saveDurably(r *record.Record) error {
	return v.follow(r, v.records.SaveDurably(r))
}

// discard moves the directory of a volume to the trash.
func (v *reservations) discard(id string) error {
	err := v.root.Discard(v.records.Dir(id))
	v.refresh(id)
	return err
}

// follow takes over what a record reserves after it was saved. After an error the disk may have either record.
func (v *reservations) follow(r *record.Record, err error) error {
	if err != nil {
		v.refresh(r.ID)
		return err
	}
	v.set(r)
	return nil
}

// set takes over what a record reserves. The caller holds the volume's lock: the record is the last that was saved.
func (v *reservations) set(r *record.Record) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.volumes != nil {
		v.put(r.ID, v.of(r))
	}
}

// refresh reads the record of a volume again. Where it cannot be read, what it reserved stays reserved.
func (v *reservations) refresh(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.volumes != nil {
		v.read(id)
	}
}

// read reads the record of a volume. The caller holds v.mu, so that a record that is saved during that is taken over after it.
func (v *reservations) read(id string) {
	r, err := v.records.Load(id)
	switch {
	case err == nil:
		v.put(id, v.of(r))
	case errdefs.IsNotFound(err):
		v.put(id, nil)
	default:
		v.unread[id] = true
	}
}

// keep reads the records once, if that was not done, and drops what volumes reserve that a person has removed. ids are the volumes that
// there are.
func (v *reservations) keep(ids []string) error {
	v.mu.Lock()
	err := v.load()
	var gone []string
	for id := range v.volumes {
		if _, found := slices.BinarySearch(ids, id); !found {
			gone = append(gone, id)
		}
	}
	v.mu.Unlock()
	for _, id := range gone {
		// It may have been made since they were listed.
		v.refresh(id)
	}
	return err
}

// load reads the records, once, and later those that could not be read. The caller holds v.mu.
func (v *reservations) load() error {
	if v.volumes != nil {
		for id := range v.unread {
			v.read(id)
		}
		return nil
	}
	ids, err := v.records.List()
	if err != nil {
		return err
	}
	v.volumes, v.unread = make(map[string]*reservation, len(ids)), map[string]bool{}
	for _, id := range ids {
		// Of a record that cannot be read, reconcile reports it. What the volume takes is not free.
		v.read(id)
	}
	return nil
}

// put replaces what a volume reserves. The caller holds v.mu.
func (v *reservations) put(id string, r *reservation) {
	delete(v.unread, id)
	before := v.volumes[id]
	if before != nil {
		v.reserved -= before.bytes()
	}
	switch {
	case r == nil:
		delete(v.volumes, id)
		return
	case before != nil && slices.Equal(before.targets, r.targets):
		// The same uppers, which a measurement may be at.
		before.size = r.size
		r = before
	}
	v.volumes[id] = r
	v.reserved += r.bytes()
}

// of returns what a record reserves, nil if that is nothing.
func (v *reservations) of(r *record.Record) *reservation {
	if r.Size == 0 || !reserves(r) || !r.Spec.ManagesUpper() {
		return nil
	}
	reserved := &reservation{id: r.ID, size: r.Size, targets: []string{""}}
	if r.Spec.Ephemeral() {
		reserved.targets = nil
		for _, p := range r.Publications {
			reserved.targets = append(reserved.targets, p.Target)
		}
	}
	for _, target := range reserved.targets {
		reserved.uppers = append(reserved.uppers, v.uppers.open(r, r.Publication(target)))
	}
	return reserved
}

// disk says how many bytes of the disk volumes can have: those that are free, and those that uppers have taken for which they are
// reserved. reserved is how many are reserved.
type disk struct{ usable, reserved int64 }

// unmeasured returns the disk without what uppers have taken, which is never more than there is.
func (v *reservations) unmeasured(context.Context) (disk, error) {
	available, err := v.diskAvailable()
	if err != nil {
		return disk{}, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.load(); err != nil {
		return disk{}, err
	}
	return disk{available, v.reservedNow()}, nil
}

// recent returns the disk as it is, or where there are many volumes, as it was some time ago: what was written and deleted since may be
// missing. It is no ground to reserve anything.
func (v *reservations) recent(ctx context.Context) (disk, error) {
	available, err := v.diskAvailable()
	if err != nil {
		return disk{}, err
	}
	v.mu.Lock()
	if time.Now().Before(v.valid) {
		defer v.mu.Unlock()
		// What pods deleted since is not free twice: it may be in what they took.
		return disk{min(available, v.available) + v.allocatedNow(), v.reservedNow()}, nil
	}
	v.mu.Unlock()
	return v.measured(ctx)
}

// measured returns the disk as it is.
func (v *reservations) measured(ctx context.Context) (disk, error) {
	before, err := v.diskAvailable()
	if err != nil {
		return disk{}, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.load(); err != nil {
		return disk{}, err
	}
	began := time.Now()
	volumes := slices.Collect(maps.Values(v.volumes))
	v.mu.Unlock()
	taken := make([][]int64, len(volumes))
	for i, r := range volumes {
		taken[i] = r.measure(ctx)
	}
	// After the uppers too: what is reserved for one meanwhile does not count as free and as its own.
	after, err := v.diskAvailable()
	v.mu.Lock()
	if err != nil {
		return disk{}, err
	}
	for i, r := range volumes {
		r.taken = taken[i]
	}
	v.available = min(before, after)
	v.valid = time.Time{}
	if len(volumes) >= manyVolumes && ctx.Err() == nil {
		v.valid = time.Now().Add(measureFactor * time.Since(began))
	}
	return disk{v.available + v.allocatedNow(), v.reservedNow()}, nil
}

// allocatedNow returns what uppers took when they were measured of what is reserved for each of them now. The caller holds v.mu.
func (v *reservations) allocatedNow() (sum int64) {
	for id, r := range v.volumes {
		for _, bytes := range r.taken {
			sum += min(bytes, max(r.size, v.growing[id]))
		}
	}
	return sum
}

// reservedNow returns what is reserved, for growth and frozen uppers too. The caller holds v.mu.
func (v *reservations) reservedNow() int64 {
	sum := v.reserved + v.held
	for id, size := range v.growing {
		switch r := v.volumes[id]; {
		case r == nil:
			sum += size
		case size > r.size:
			sum += (size - r.size) * int64(len(r.uppers))
		}
	}
	return sum
}

func (v *reservations) diskAvailable() (int64, error) {
	usage, err := linux.FileSystemUsageAt(v.root.Path())
	return usage.Bytes.Available, err
}

// measure returns how much each of the uppers takes of the disk.
func (r *reservation) measure(ctx context.Context) []int64 {
	taken := make([]int64, len(r.uppers))
	for i, u := range r.uppers {
		bytes, err := u.DiskUsage(ctx)
		if err == nil {
			taken[i] = bytes
		} else if !errdefs.IsNotFound(err) {
			klog.FromContext(ctx).V(4).Info("Could not measure volume usage", keyVolume, r.id, keyReason, err.Error())
		}
	}
	return taken
}

// growTo reserves the size that a volume will have until release is called.
func (v *reservations) growTo(id string, size int64) (release func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.growing[id] = size
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		delete(v.growing, id)
	}
}

// hold reserves bytes until release is called. What of them is on the disk by then counts twice until then.
func (v *reservations) hold(bytes int64) (release func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.held += bytes
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.held -= bytes
	}
}
