package meta

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
)

// State is the catalogue at one revision. It never changes, so it may be read without a lock by any
// number of goroutines and kept as long as one likes; its methods return copies that the caller
// owns. The zero State is the empty catalogue of a cluster that is not initialised.
type State struct {
	revision Revision
	cluster  trivet.ClusterID
	created  time.Time
	nodes    map[trivet.NodeID]*Node // never changed in place, nor are the records

	forgotten []trivet.NodeID // sorted; never changed in place

	volumes shards[trivet.VolumeID, *Volume]
	names   shards[string, trivet.VolumeID]   // of every volume but those being deleted
	used    shards[trivet.VolumeID, struct{}] // every ID that was ever created, for ever (H35)

	snaps     shards[trivet.SnapshotID, *Snapshot]
	snapNames shards[string, trivet.SnapshotID] // of every snapshot but those being deleted
	snapsOf   shards[trivet.VolumeID, []trivet.SnapshotID]
	clonesOf  shards[trivet.SnapshotID, []trivet.VolumeID] // volumes that still need the snapshot's blocks
	creating  []trivet.SnapshotID                          // those in that state, sorted; replaced, never changed in place

	audit auditLog

	groups     shards[trivet.SnapshotGroupID, *SnapshotGroup]
	groupNames shards[string, trivet.SnapshotGroupID] // of every group but those being deleted
	unsettled  []trivet.SnapshotGroupID               // those still to be made, sorted; replaced, never changed in place
}

// Revision returns the number of commands that changed the catalogue.
func (s *State) Revision() Revision { return s.revision }

// Cluster returns the cluster's ID, empty before InitCluster.
func (s *State) Cluster() trivet.ClusterID { return s.cluster }

// Created returns when the cluster was initialised, in UTC.
func (s *State) Created() time.Time { return s.created }

// Volume returns the volume with that ID, and whether there is one.
func (s *State) Volume(id trivet.VolumeID) (Volume, bool) {
	v, ok := s.volumes.get(id)
	if !ok {
		return Volume{}, false
	}
	return v.Clone(), true
}

// Epochs returns the newest and the fenced epoch of a volume and the one that the node holds, 0 = none, and whether
// there is such a volume. Unlike Volume it copies nothing: each read and write asks.
func (s *State) Epochs(id trivet.VolumeID, node trivet.NodeID) (newest, fenced, held trivet.Epoch, ok bool) {
	v, ok := s.volumes.get(id)
	if !ok {
		return 0, 0, 0, false
	}
	if g := v.GrantOf(node); g != nil {
		held = g.Epoch
	}
	return v.Epoch, v.FencedEpoch, held, true
}

// VolumeByName returns the volume that holds the name. One being deleted holds it no longer.
func (s *State) VolumeByName(name string) (Volume, bool) {
	id, ok := s.names.get(name)
	if !ok {
		return Volume{}, false
	}
	return s.Volume(id)
}

// Volumes returns every volume, sorted by ID.
func (s *State) Volumes() []Volume {
	out := make([]Volume, 0, s.volumes.n)
	s.volumes.each(func(_ trivet.VolumeID, v *Volume) { out = append(out, v.Clone()) })
	slices.SortFunc(out, func(a, b Volume) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// Used reports whether the ID belongs, or ever belonged, to a volume.
func (s *State) Used(id trivet.VolumeID) bool {
	_, ok := s.used.get(id)
	return ok
}

// Node returns the node with that ID, and whether there is one.
func (s *State) Node(id trivet.NodeID) (Node, bool) {
	n, ok := s.nodes[id]
	if !ok {
		return Node{}, false
	}
	return n.Clone(), true
}

// Nodes returns every node, sorted by ID.
func (s *State) Nodes() []Node {
	out := make([]Node, 0, len(s.nodes))
	for _, id := range slices.Sorted(maps.Keys(s.nodes)) {
		out = append(out, s.nodes[id].Clone())
	}
	return out
}

// Forgotten reports whether the node was forgotten, so that it may not register.
func (s *State) Forgotten(id trivet.NodeID) bool {
	_, ok := slices.BinarySearch(s.forgotten, id)
	return ok
}

// AllForgotten returns the nodes that may not register, sorted.
func (s *State) AllForgotten() []trivet.NodeID { return slices.Clone(s.forgotten) }

// diskOwner returns the node that registered the disk, or "".
func (s *State) diskOwner(id trivet.DiskID) trivet.NodeID {
	for _, n := range s.nodes {
		for _, d := range n.Disks {
			if d.ID == id {
				return n.ID // at most one: RegisterNode refuses a second
			}
		}
	}
	return ""
}

const shardN = 256

type volumeOrName interface {
	trivet.VolumeID | trivet.SnapshotID | trivet.SnapshotGroupID | string
}

// shards is a map that is copied on write, one shard of 256 at a time: with 100 000 volumes a
// change copies some 400 pointers instead of all. The zero value is empty.
type shards[K volumeOrName, V any] struct {
	parts *[shardN]map[K]V
	n     int
}

// shardOf spreads keys by FNV-1a.
func shardOf[K volumeOrName](k K) uint8 {
	const offset, prime = 2166136261, 16777619
	h := uint32(offset)
	switch k := any(k).(type) {
	case string:
		for i := range len(k) {
			h = (h ^ uint32(k[i])) * prime
		}
	case trivet.VolumeID:
		for i := range 8 {
			h = (h ^ uint32(uint8(k>>(8*i)))) * prime
		}
	case trivet.SnapshotID:
		for i := range 8 {
			h = (h ^ uint32(uint8(k>>(8*i)))) * prime
		}
	case trivet.SnapshotGroupID:
		for i := range 8 {
			h = (h ^ uint32(uint8(k>>(8*i)))) * prime
		}
	}
	return uint8(h ^ h>>8 ^ h>>16)
}

func (s shards[K, V]) get(k K) (V, bool) {
	if s.parts == nil {
		var zero V
		return zero, false
	}
	v, ok := s.parts[shardOf(k)][k]
	return v, ok
}

func (s shards[K, V]) with(k K, v V) shards[K, V] {
	parts, part := s.open(k)
	if _, ok := part[k]; !ok {
		s.n++
	}
	part[k] = v
	return shards[K, V]{parts: parts, n: s.n}
}

// fill sets an entry in place. REQUIRES: nobody else has seen s yet.
func (s *shards[K, V]) fill(k K, v V) {
	if s.parts == nil {
		s.parts = new([shardN]map[K]V)
	}
	part := &s.parts[shardOf(k)]
	if *part == nil {
		*part = make(map[K]V)
	}
	if _, ok := (*part)[k]; !ok {
		s.n++
	}
	(*part)[k] = v
}

func (s shards[K, V]) without(k K) shards[K, V] {
	if _, ok := s.get(k); !ok {
		return s
	}
	parts, part := s.open(k)
	delete(part, k)
	return shards[K, V]{parts: parts, n: s.n - 1}
}

// open returns copies of the table and of the shard of k, in which k may be changed.
func (s shards[K, V]) open(k K) (*[shardN]map[K]V, map[K]V) {
	parts := new([shardN]map[K]V)
	if s.parts != nil {
		*parts = *s.parts
	}
	i := shardOf(k)
	part := maps.Clone(parts[i])
	if part == nil {
		part = make(map[K]V)
	}
	parts[i] = part
	return parts, part
}

// each calls f for every entry, in no order.
func (s shards[K, V]) each(f func(K, V)) {
	if s.parts == nil {
		return
	}
	for _, part := range s.parts {
		for k, v := range part {
			f(k, v)
		}
	}
}
