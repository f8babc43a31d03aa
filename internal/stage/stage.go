// Package stage measures where the requests of a volume spend their time: each stage of the data path has a
// Meter, which counts what comes and goes and keeps a histogram of the times. Explain turns what was seen in
// a window into the stage that limits the volume and the setting that would help.
//
// What it guarantees: to observe takes a few atomic operations, no lock and no allocation; a Meter has a fixed
// size, about 2 KiB, and exists only for stages that were used; a nil Registry, Volume and Meter do nothing, so
// that packages can be used without. Nothing is written anywhere: a window is the difference of two looks, and
// the number of requests in a stage is sampled only while somebody watches.
//
// How to use it: whoever serves a volume, as the path of an attachment or as a replica, opens it in the
// Registry of the process, keeps the Meters it needs, and closes it. A volume that nobody has open is gone.
package stage

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/trivet-csi/trivet"
)

// Stage is a part of the data path.
type Stage uint8

// The stages, in the order in which a write meets them. The first four are whole requests, from the kernel
// device or the NBD server until they are answered, and contain all others.
const (
	Read        Stage = iota // requests
	Write                    //
	Discard                  // with write-zeroes
	Flush                    //
	Throttle                 // held back by the volume's own limits
	Scheduler                // held back for other volumes of the node
	Cache                    // in the cache, until it answers or passes the request on
	CacheRoom                // held back because the cache has no room for more dirty blocks
	WriteBack                // cache: dirty blocks on their way to what is below
	Replication              // below everything: sent to the group and answered
	DiskTurn                 // leader: held back for other volumes with leaders on the disk
	Queue                    // leader: waiting for a place in a log entry
	LeaderLog                // leader: appends to its log until they are on stable storage
	Network                  // leader: entries sent until the follower's answer, its log included
	FollowerLog              // follower: appends to its log until they are on stable storage
	Apply                    // every replica: batches of entries applied to the engine
	ServeRead                // the replica that answers: reads from the engine
	stageN
)

var names = [stageN]string{
	"read", "write", "discard", "flush", "throttle", "scheduler", "cache", "cache_room",
	"write_back", "replication", "disk_turn", "queue", "leader_log",
	"network", "follower_log", "apply", "serve_read",
}

// String returns the name that metrics and reports use.
func (s Stage) String() string {
	if s >= stageN {
		return "unknown"
	}
	return names[s]
}

// All returns every stage, in order.
func All() []Stage {
	all := make([]Stage, stageN)
	for i := range all {
		all[i] = Stage(i)
	}
	return all
}

// Registry holds what this process serves. The zero value is ready; nil measures nothing.
type Registry struct {
	mu      sync.Mutex
	volumes map[trivet.VolumeID]*Volume
}

// Volume is what is measured of a volume in this process.
type Volume struct {
	id  trivet.VolumeID
	reg *Registry

	users  int // under reg.mu
	meters [stageN]atomic.Pointer[Meter]
	cache  atomic.Pointer[func() CacheCounts]
	device atomic.Pointer[func() DeviceSummary]
}

// NewRegistry returns a Registry without volumes.
func NewRegistry() *Registry { return &Registry{} }

// Open returns the volume, which stays for as long as one that opened it has not closed it.
func (r *Registry) Open(id trivet.VolumeID) *Volume {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	v := r.volumes[id]
	if v == nil {
		if r.volumes == nil {
			r.volumes = make(map[trivet.VolumeID]*Volume)
		}
		v = &Volume{id: id, reg: r}
		r.volumes[id] = v
	}
	v.users++
	return v
}

// Close undoes one Open. REQUIRES: called once for each.
func (v *Volume) Close() {
	if v == nil {
		return
	}
	v.reg.mu.Lock()
	defer v.reg.mu.Unlock()
	if v.users--; v.users == 0 {
		delete(v.reg.volumes, v.id)
	}
}

// Meter returns the Meter of a stage, which is made at the first call.
func (v *Volume) Meter(s Stage) *Meter {
	if v == nil {
		return nil
	}
	if m := v.meters[s].Load(); m != nil {
		return m
	}
	v.meters[s].CompareAndSwap(nil, new(Meter))
	return v.meters[s].Load()
}

// ID returns whose measurements these are.
func (v *Volume) ID() trivet.VolumeID { return v.id }

// Used returns the stages that have a Meter, and those, in order.
func (v *Volume) Used() ([]Stage, []*Meter) {
	var stages []Stage
	var meters []*Meter
	for s := range stageN {
		if m := v.meters[s].Load(); m != nil {
			stages, meters = append(stages, s), append(meters, m)
		}
	}
	return stages, meters
}

// Volumes returns what is open at the moment, in no order.
func (r *Registry) Volumes() []*Volume {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*Volume, 0, len(r.volumes))
	for _, v := range r.volumes {
		all = append(all, v)
	}
	return all
}

// volume returns one that is open, or nil.
func (r *Registry) volume(id trivet.VolumeID) *Volume {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.volumes[id]
}

var base = time.Now()

// Now returns the monotonic clock, from some origin: cheaper than time.Now, which reads two clocks.
func Now() time.Duration { return time.Since(base) }
