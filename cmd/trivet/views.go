package main

import (
	"slices"
	"strings"

	"github.com/trivet-csi/trivet/api"
)

// The views are what `-o json` prints: the fields of the protocol under their JSON names, with
// numbers as numbers (protojson would turn 64-bit ones into strings).

type volumeView struct {
	ID         string            `json:"id"`
	Name       string            `json:"name"`
	SizeBytes  int64             `json:"sizeBytes"`
	Phase      string            `json:"phase"`
	Reason     string            `json:"reason,omitempty"`
	Reclaim    string            `json:"reclaimPolicy"`
	Parameters map[string]string `json:"parameters,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Replicas   []replicaView     `json:"replicas"`
	Want       int32             `json:"wantReplicas"`
	Retired    []replicaView     `json:"retired,omitempty"`       // their data is still to be removed
	Used       int64             `json:"usedBytes"`               // of its blocks, once; -1: nobody said
	WantSize   int64             `json:"wantSizeBytes,omitempty"` // that it grows to
	Pending    string            `json:"pending,omitempty"`       // what a change of the replicas waits for
	Epoch      uint64            `json:"epoch"`
	Attached   string            `json:"attachedNode,omitempty"`
	AttachedTo []string          `json:"attachedNodes,omitempty"` // more than one only to read
	ReadOnly   bool              `json:"attachedReadOnly,omitempty"`
	Device     string            `json:"device,omitempty"`
	Usage      *usageView        `json:"usage,omitempty"` // absent: nobody was asked, or could say
	Created    string            `json:"created"`
}

type replicaView struct {
	ID        string `json:"id"`
	Node      string `json:"node"`
	Disk      string `json:"disk"`
	State     string `json:"state"`
	Reason    string `json:"reason,omitempty"`
	Leader    bool   `json:"leader"`
	Applied   uint64 `json:"applied,omitempty"`
	Commit    uint64 `json:"commit,omitempty"`
	Term      uint64 `json:"term,omitempty"`
	UsedBytes int64  `json:"usedBytes,omitempty"`
	Replaces  string `json:"replaces,omitempty"`
}

type nodeView struct {
	ID       string     `json:"id"`
	Address  string     `json:"address"`
	Zone     string     `json:"zone,omitempty"`
	Rack     string     `json:"rack,omitempty"`
	State    string     `json:"state"`
	Role     string     `json:"role"`
	Replicas int32      `json:"replicas"`
	Cordoned bool       `json:"cordoned"`
	Draining bool       `json:"draining"`
	Disks    []diskView `json:"disks"`
}

type diskView struct {
	ID        string `json:"id"`
	Path      string `json:"path"`
	SizeBytes int64  `json:"sizeBytes"`
	FreeBytes int64  `json:"freeBytes"`
}

func volumeOf(v *api.Volume) volumeView {
	view := volumeView{
		ID: v.GetId(), Name: v.GetName(), SizeBytes: v.GetSizeBytes(), Phase: v.GetPhase(), Reason: v.GetReason(),
		Reclaim: v.GetReclaimPolicy(), Parameters: v.GetParameters(), Labels: v.GetLabels(), Epoch: v.GetEpoch(),
		Attached: v.GetAttachedNode(), Device: v.GetDevice(), Created: v.GetCreated(), Replicas: []replicaView{},
		Want: v.GetWantReplicas(), Pending: v.GetPending(), AttachedTo: v.GetAttachedNodes(),
		ReadOnly: v.GetAttachedReadOnly(), WantSize: v.GetWantSizeBytes(), Used: v.GetUsedBytes(),
		Usage: usageOf(v.GetUsage()),
	}
	for _, r := range v.GetReplicas() {
		view.Replicas = append(view.Replicas, replicaOf(r))
	}
	for _, r := range v.GetRetired() {
		view.Retired = append(view.Retired, replicaOf(r))
	}
	return view
}

func replicaOf(r *api.Replica) replicaView {
	return replicaView{
		ID: r.GetId(), Node: r.GetNode(), Disk: r.GetDisk(), State: r.GetState(), Reason: r.GetReason(),
		Leader: r.GetLeader(), Applied: r.GetApplied(), Commit: r.GetCommit(), Term: r.GetTerm(),
		UsedBytes: r.GetUsedBytes(), Replaces: r.GetReplaces(),
	}
}

func nodeOf(n *api.Node) nodeView {
	view := nodeView{
		ID: n.GetId(), Address: n.GetAddress(), Zone: n.GetZone(), Rack: n.GetRack(), State: n.GetState(),
		Role:     n.GetRole(),
		Replicas: n.GetReplicaCount(), Disks: []diskView{}, Cordoned: n.GetCordoned(), Draining: n.GetDraining(),
	}
	for _, d := range n.GetDisks() {
		view.Disks = append(view.Disks, diskView{
			ID: d.GetId(), Path: d.GetPath(), SizeBytes: d.GetSizeBytes(), FreeBytes: d.GetFreeBytes(),
		})
	}
	return view
}

// stateText says whether a node is up, and whether an operator keeps replicas off it.
func (n nodeView) stateText() string {
	switch {
	case n.Draining:
		return n.State + ",draining"
	case n.Cordoned:
		return n.State + ",cordoned"
	}
	return n.State
}

// attachedText names every node that has the volume attached.
func (v volumeView) attachedText() string {
	text := v.Attached // of a server that tells only one
	if len(v.AttachedTo) > 0 {
		text = strings.Join(v.AttachedTo, ",")
	}
	if v.ReadOnly {
		text += " (read-only)"
	}
	return text
}

func nodeTable(nodes []nodeView) table {
	t := table{header: []string{"NODE", "STATE", "ROLE", "ZONE", "RACK", "ADDRESS", "REPLICAS", "FREE", "SIZE"}}
	for _, n := range nodes {
		var free, size int64
		for _, d := range n.Disks {
			free, size = free+d.FreeBytes, size+d.SizeBytes
		}
		t.rows = append(t.rows, []string{
			n.ID, n.stateText(), n.Role, n.Zone, n.Rack, n.Address, itoa(int64(n.Replicas)), sizeText(free), sizeText(size),
		})
	}
	return t
}

func volumeTable(volumes []volumeView) table {
	t := table{header: []string{"NAME", "ID", "SIZE", "PHASE", "LEADER", "REPLICAS", "ATTACHED"}}
	for _, v := range volumes {
		var nodes []string
		leader := ""
		for _, r := range v.Replicas {
			nodes = append(nodes, r.Node)
			if r.Leader {
				leader = r.Node
			}
		}
		t.rows = append(t.rows, []string{
			v.Name, v.ID, sizeText(v.SizeBytes), v.Phase, leader, strings.Join(nodes, ","), v.attachedText(),
		})
	}
	return t
}

func replicaTable(v volumeView) table {
	t := table{header: []string{"REPLICA", "NODE", "STATE", "LEADER", "APPLIED", "COMMIT", "TERM", "USED", "REASON"}}
	for _, r := range slices.Concat(v.Replicas, v.Retired) {
		leader := ""
		if r.Leader {
			leader = "yes"
		}
		row := []string{r.ID, r.Node, r.State, leader, "", "", "", "", r.Reason}
		if r.Term > 0 { // only the node that holds a replica knows these
			row[4], row[5], row[6], row[7] = utoa(r.Applied), utoa(r.Commit), utoa(r.Term), sizeText(r.UsedBytes)
		}
		t.rows = append(t.rows, row)
	}
	return t
}
