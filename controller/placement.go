package controller

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// The topology keys that segments use. PersistentVolumes and node labels hold them, so they never
// change.
const (
	TopologyNode = "topology." + trivet.DriverName + "/node"
	TopologyZone = "topology." + trivet.DriverName + "/zone"
	TopologyRack = "topology." + trivet.DriverName + "/rack"
)

// PlaceRequest says what is to be placed.
type PlaceRequest struct {
	SizeBytes int64
	Replicas  int
	Spread    Spread

	// Requisite, when not empty, are segments that the volume must have to do with: all replicas go
	// into them when they have nodes enough, otherwise at least the first one does. (With
	// WaitForFirstConsumer they are just the node of the pod.) Preferred are segments for the first
	// replica, best first. A segment with no key is every node.
	Requisite, Preferred []map[string]string

	// Load is what the disks carry already.
	Load map[trivet.DiskID]Load

	// Beside are the replicas that the volume has and keeps. Their nodes get no other one, and their
	// zones count as taken.
	Beside []meta.Replica
	// Avoid are nodes that must not be chosen now, for a reason that passes.
	Avoid map[trivet.NodeID]bool
}

// Load is what the catalogue has placed on a disk. Volumes are thin: ProvisionedBytes is what they
// may come to use.
type Load struct {
	Replicas         int
	ProvisionedBytes int64
}

// LoadOf adds up what each disk carries.
func LoadOf(volumes []meta.Volume) map[trivet.DiskID]Load {
	out := map[trivet.DiskID]Load{}
	for _, v := range volumes {
		for _, r := range v.Replicas {
			if r.State != meta.ReplicaRemoved {
				addLoad(out, r.Disk, v.SizeBytes)
			}
		}
		for _, r := range v.Retired { // their data is there still
			addLoad(out, r.Disk, v.SizeBytes)
		}
	}
	return out
}

func addLoad(load map[trivet.DiskID]Load, disk trivet.DiskID, sizeBytes int64) {
	l := load[disk]
	l.Replicas++
	l.ProvisionedBytes += sizeBytes
	load[disk] = l
}

// domainOf names what two replicas must not share on n, under a spread: its rack within its zone, its zone, or else the
// node itself.
func domainOf(n *meta.Node, s Spread) string {
	switch s {
	case SpreadZone:
		return n.Zone
	case SpreadRack:
		return rackOf(n)
	case SpreadNode:
	}
	return string(n.ID)
}

// rackOf tells racks of different zones apart, whatever they are called.
func rackOf(n *meta.Node) string { return n.Zone + "\x00" + n.Rack }

// candidate is a node that can take a replica, with the best of its disks.
type candidate struct {
	node     trivet.NodeID
	zone     string
	rack     string // rackOf
	domain   string // domainOf
	disk     trivet.DiskID
	spare    int64 // bytes left when every volume on the disk is full; may be negative
	replicas int   // already on that disk
	required bool  // lies in a requisite segment
	rank     int   // index of the first preferred segment it lies in
}

// Place chooses a node and a disk for every replica, the first of which is meant to lead. It is
// pure: the same arguments, in whatever order the nodes come, give the same answer. The replicas
// have no ID yet.
//
// A node qualifies when its lease is live at now, it is not cordoned, has no replica of the volume yet (Beside) and
// one of its disks has SizeBytes free. Among those, replicas go to as many zones as possible, then to as many racks,
// then to the disks with most room once every volume there has grown to its full size, then to those with fewest
// replicas. ErrNoSpace, naming how many nodes qualify and why others do not, when there are too few.
func Place(nodes []meta.Node, req PlaceRequest, now time.Time) ([]meta.Replica, error) {
	candidates, refused := qualify(nodes, req, now)
	if len(candidates) < req.Replicas {
		return nil, tooFew(req, len(candidates), len(nodes), refused)
	}
	required := 0
	for _, c := range candidates {
		if c.required {
			required++
		}
	}
	if required == 0 {
		return nil, fmt.Errorf("place %d replicas of %d bytes: none of %d qualifying nodes is in the required topology%s: %w",
			req.Replicas, req.SizeBytes, len(candidates), refused, trivet.ErrNoSpace)
	}
	taken := countBeside(nodes, req.Beside, func(n *meta.Node) string { return domainOf(n, req.Spread) })
	// The volume must not get two replicas in one zone, or rack.
	candidates = slices.DeleteFunc(candidates, func(c candidate) bool { return taken[c.domain] > 0 })
	if required >= req.Replicas && domainsN(candidates, true) >= req.Replicas {
		candidates = slices.DeleteFunc(candidates, func(c candidate) bool { return !c.required })
	}
	if n := domainsN(candidates, false); n < req.Replicas {
		return nil, fmt.Errorf("place %d replicas of %d bytes in a %s each: %d of them have a qualifying node%s: %w",
			req.Replicas, req.SizeBytes, req.Spread, n, refused, trivet.ErrNoSpace)
	}
	return choose(candidates, req, zonesOf(nodes, req.Beside), countBeside(nodes, req.Beside, rackOf)), nil
}

// zonesOf counts replicas by the zones of their nodes.
func zonesOf(nodes []meta.Node, replicas []meta.Replica) map[string]int {
	return countBeside(nodes, replicas, func(n *meta.Node) string { return n.Zone })
}

// countBeside counts replicas by what of says of their nodes.
func countBeside(nodes []meta.Node, replicas []meta.Replica, of func(*meta.Node) string) map[string]int {
	out := map[string]int{}
	for _, r := range replicas {
		for i := range nodes {
			if nodes[i].ID == r.Node {
				out[of(&nodes[i])]++
			}
		}
	}
	return out
}

// choose picks one by one; each pick prefers a zone that has fewest replicas so far, then such a rack, and is counted
// there. Under a spread of zones or racks the pick ends those of its domain.
func choose(candidates []candidate, req PlaceRequest, zones, racks map[string]int) []meta.Replica {
	out := make([]meta.Replica, 0, req.Replicas)
	for len(out) < req.Replicas {
		first := len(out) == 0
		best := slices.MinFunc(candidates, func(a, b candidate) int {
			if first {
				if c := cmp.Or(-compareBool(a.required, b.required), cmp.Compare(a.rank, b.rank)); c != 0 {
					return c
				}
			}
			return cmp.Or(
				cmp.Compare(zones[a.zone], zones[b.zone]),
				cmp.Compare(racks[a.rack], racks[b.rack]),
				cmp.Compare(b.spare, a.spare),
				cmp.Compare(a.replicas, b.replicas),
				cmp.Compare(a.node, b.node),
			)
		})
		zones[best.zone]++
		racks[best.rack]++
		out = append(out, meta.Replica{Node: best.node, Disk: best.disk, State: meta.ReplicaCreating})
		candidates = slices.DeleteFunc(candidates, func(c candidate) bool { return c.domain == best.domain })
	}
	return out
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	default:
		return -1
	}
}

func domainsN(candidates []candidate, required bool) int {
	domains := map[string]bool{}
	for _, c := range candidates {
		if c.required || !required {
			domains[c.domain] = true
		}
	}
	return len(domains)
}

// reasons say why nodes do not qualify; they print as the middle of an error.
type reasons struct {
	down     []string
	cordoned []string
	taken    []string
	avoided  []string
	small    []string
}

func (r reasons) String() string {
	var b strings.Builder
	for _, why := range []struct {
		text  string
		nodes []string
	}{
		{"down", r.down},
		{"cordoned", r.cordoned},
		{"with a replica of it", r.taken},
		{"busy or tried lately", r.avoided},
		{"too little room", r.small},
	} {
		if len(why.nodes) > 0 {
			fmt.Fprintf(&b, "; %s: %s", why.text, strings.Join(why.nodes, ", "))
		}
	}
	return b.String()
}

func tooFew(req PlaceRequest, qualify, all int, why reasons) error {
	return fmt.Errorf("place %d replicas of %d bytes: %d of %d nodes qualify%s: %w",
		req.Replicas, req.SizeBytes, qualify, all, why, trivet.ErrNoSpace)
}

// qualify returns the nodes that can take a replica, in the order of their names.
func qualify(nodes []meta.Node, req PlaceRequest, now time.Time) ([]candidate, reasons) {
	var out []candidate
	var why reasons
	nodes = slices.Clone(nodes)
	slices.SortFunc(nodes, func(a, b meta.Node) int { return cmp.Compare(a.ID, b.ID) })
	for _, n := range nodes {
		if !n.Alive(now) {
			why.down = append(why.down, string(n.ID))
			continue
		}
		if n.Cordoned {
			why.cordoned = append(why.cordoned, string(n.ID))
			continue
		}
		if slices.ContainsFunc(req.Beside, func(r meta.Replica) bool { return r.Node == n.ID }) {
			why.taken = append(why.taken, string(n.ID))
			continue
		}
		if req.Avoid[n.ID] {
			why.avoided = append(why.avoided, string(n.ID))
			continue
		}
		c, ok := bestDisk(&n, req)
		if !ok {
			why.small = append(why.small, fmt.Sprintf("%s (%d bytes free)", n.ID, freeBytes(&n)))
			continue
		}
		c.required = len(req.Requisite) == 0 || segmentOf(&n, req.Requisite) < len(req.Requisite)
		c.rank = segmentOf(&n, req.Preferred)
		out = append(out, c)
	}
	return out, why
}

// bestDisk returns the node with the disk that has most room.
func bestDisk(n *meta.Node, req PlaceRequest) (candidate, bool) {
	var best candidate
	found := false
	for _, d := range n.Disks {
		if d.FreeBytes < req.SizeBytes {
			continue
		}
		load := req.Load[d.ID]
		c := candidate{
			node: n.ID, zone: n.Zone, rack: rackOf(n), domain: domainOf(n, req.Spread), disk: d.ID,
			spare: min(d.FreeBytes, d.SizeBytes-load.ProvisionedBytes), replicas: load.Replicas,
		}
		better := cmp.Or(cmp.Compare(c.spare, best.spare), cmp.Compare(best.replicas, c.replicas),
			cmp.Compare(best.disk, c.disk)) > 0
		if !found || better {
			best, found = c, true
		}
	}
	return best, found
}

// freeBytes returns what the roomiest disk of a node has free.
func freeBytes(n *meta.Node) int64 {
	var most int64
	for _, d := range n.Disks {
		most = max(most, d.FreeBytes)
	}
	return most
}

// segmentOf returns the index of the first segment that n lies in, or their number.
func segmentOf(n *meta.Node, segments []map[string]string) int {
	for i, s := range segments {
		if inSegment(n, s) {
			return i
		}
	}
	return len(segments)
}

func inSegment(n *meta.Node, segment map[string]string) bool {
	for k, v := range segment {
		switch k {
		case TopologyNode:
			if string(n.ID) != v {
				return false
			}
		case TopologyZone:
			if n.Zone != v {
				return false
			}
		case TopologyRack:
			if n.Rack != v {
				return false
			}
		default:
			return false
		}
	}
	return true
}
