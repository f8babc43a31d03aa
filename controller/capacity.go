package controller

import (
	"sort"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// pool is the room of the nodes that one replica of a volume may be on, and no other: a node, a rack or a zone.
type pool struct {
	freeBytes   int64
	insideBytes int64 // of it, in the segment that is asked about
}

// poolsOf gathers the room of the nodes that can get replicas by what two replicas must not share. Disks and nodes with
// room for less than a unit have none.
func poolsOf(nodes []meta.Node, spread Spread, segment map[string]string) []pool {
	byDomain := map[string]*pool{}
	for i := range nodes {
		n := &nodes[i]
		p := byDomain[domainOf(n, spread)]
		if p == nil {
			p = &pool{}
			byDomain[domainOf(n, spread)] = p
		}
		var free int64
		for _, d := range n.Disks {
			if d.FreeBytes >= sizeUnit {
				free += d.FreeBytes
			}
		}
		p.freeBytes += free
		if inSegment(n, segment) {
			p.insideBytes += free
		}
	}
	out := make([]pool, 0, len(byDomain))
	for _, p := range byDomain {
		if p.freeBytes > 0 {
			out = append(out, *p)
		}
	}
	return out
}

// capacitySteps is how many volumes what is available is tried with: what is left over on each disk is less than one of
// them, so the answer is right to a few in a thousand for each disk and replica.
const capacitySteps = 400

// fitting returns how many bytes of volumes there is room for, as Place places one after the other until none fits.
// Nothing short of that is right: replicas go to zones and racks that have none before they go where room is, so the
// room of nodes that share a zone may go unused, or not. Volumes are thin, so what is free is what is not written,
// beside the engines' reserves. nodes are those that can get replicas; they stay as they are.
func fitting(nodes []meta.Node, req PlaceRequest, now time.Time) int64 {
	var segment map[string]string // none: all nodes are inside
	if len(req.Requisite) > 0 {
		segment = req.Requisite[0]
	}
	most := boundOf(poolsOf(nodes, req.Spread, segment), req.Replicas)
	req.SizeBytes = max(most/capacitySteps/sizeUnit*sizeUnit, sizeUnit)
	left := make([]meta.Node, len(nodes))
	disks := map[trivet.DiskID]*meta.Disk{}
	for i := range nodes {
		left[i] = nodes[i].Clone()
		for k := range left[i].Disks {
			disks[left[i].Disks[k].ID] = &left[i].Disks[k]
		}
	}
	var sum int64
	for {
		where, err := Place(left, req, now)
		if err != nil {
			return sum
		}
		for _, r := range where {
			disks[r.Disk].FreeBytes -= req.SizeBytes
		}
		sum += req.SizeBytes
	}
}

// boundOf returns a bound on the bytes of volumes with that many replicas, each in a pool of its own, that any
// placement has room for: the pools, none counted for more than v, for it can have one copy only, must have
// replicas·v bytes together, and those in the segment v, for the copy that must be there.
func boundOf(pools []pool, replicas int) int64 {
	var most int64
	for _, p := range pools {
		most += p.freeBytes
	}
	fits := func(v int64) bool {
		var all, inside int64
		for _, p := range pools {
			all += min(p.freeBytes, v)
			inside += min(p.insideBytes, v)
		}
		return all >= int64(replicas)*v && inside >= v
	}
	// The largest v that fits, by bisection in units: what fits, fits also smaller, for min(x, v)/v never rises with v.
	n := most / int64(replicas) / sizeUnit
	return int64(sort.Search(int(n), func(i int) bool { return !fits(int64(i+1) * sizeUnit) })) * sizeUnit
}
