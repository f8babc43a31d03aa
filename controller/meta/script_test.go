package meta_test

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// TestScripts runs testdata/*.txt. Commands take v= (volume number), n= (node number), e= (epoch):
//
//	create v=1 n=(1,2,3) policy=retain [request=r] [claim] [wipe]
//	report v=1 n=1 state=Ready | attach v=1 n=1 [mode=…] [ro] [e=4] [with=n2] | takeover v=1 n=1 [i=5]
//	detach v=1 [n=1] [e=4] [forced] | fence v=1 e=2 | leader v=1 n=2 [term=3] | want v=1 n=2
//	release v=1 [discard] [skip] | reclaim v=1 policy=delete | wiped v=1 e=3 | fail v=1 reason=x
//	add v=1 n=4 [as=7] [disk=5] [replaces=2] [rev=9] | remove v=1 n=2 [rev=9] | count v=1 to=5
//	register n=1 i=2 [disk=8] | cordon n=1 [drain] | uncordon n=1 | forget n=1 [alive] [allow] | state
//	recover v=1 n=1 [rev=9] | recovered v=1 n=1
//	audit (kind, volume, node and detail of every record)
//	grow v=1 to=2 [rev=9] | sized v=1 to=2 (both in GiB)
//
// A replica has the number of its node, or the one given by as=. add and remove are decided on the
// revision that the volume has, unless rev= says otherwise.
func TestScripts(t *testing.T) {
	t.Parallel()
	datadriven.Walk(t, "testdata/scripts", func(t *testing.T, path string) {
		m := cluster(t)
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd == "state" {
				return describe(m.State())
			}
			if d.Cmd == "audit" {
				return auditText(t, m.State())
			}
			c := scripted(t, m, d)
			if c.Audited() {
				c.Time, c.By = day, "n9"
			}
			// What a member applies has been through the log.
			b, err := c.Encode()
			require.NoError(t, err)
			c, err = meta.Decode(b)
			require.NoError(t, err)
			before := m.State().Revision()
			res := m.Apply(c)
			switch {
			case res.Err != nil:
				return fmt.Sprintf("err: %v\n", res.Err)
			case res.Revision == before:
				return "no effect: " + line(res.Volume)
			case res.Node != nil:
				return fmt.Sprintf("%s cordoned=%t draining=%t\n", res.Node.ID, res.Node.Cordoned, res.Node.Draining)
			default:
				return line(res.Volume)
			}
		})
	})
}

func number(t *testing.T, d *datadriven.TestData, key string) int {
	n := 0
	d.MaybeScanArgs(t, key, &n)
	return n
}

func word(t *testing.T, d *datadriven.TestData, key, otherwise string) string {
	d.MaybeScanArgs(t, key, &otherwise)
	return otherwise
}

func scripted(t *testing.T, m *meta.Machine, d *datadriven.TestData) meta.Command {
	v, n := number(t, d, "v"), 0
	if d.Cmd != "create" { // where it is a list
		n = number(t, d, "n")
	}
	id, epoch := trivet.VolumeID(v), trivet.Epoch(number(t, d, "e"))
	policy := meta.ReclaimPolicy(word(t, d, "policy", "delete"))
	switch d.Cmd {
	case "create":
		a, _ := d.Arg("n")
		nodes := make([]int, len(a.Vals))
		for i := range a.Vals {
			var err error
			nodes[i], err = strconv.Atoi(a.Vals[i])
			require.NoError(t, err)
		}
		vol := volume(v, policy, nodes...)
		vol.Name = word(t, d, "name", vol.Name)
		vol.Request = word(t, d, "request", vol.Request)
		if d.HasArg("wipe") {
			vol.Params[meta.ParamReclaimWipe] = "zero"
		}
		return meta.Command{CreateVolume: &meta.CreateVolume{Volume: vol, Claim: d.HasArg("claim")}}
	case "report":
		c := report(v, n, meta.ReplicaState(word(t, d, "state", "")))
		c.ReportReplica.Reason = word(t, d, "reason", "")
		return c
	case "attach":
		mode := meta.AccessMode(word(t, d, "mode", string(meta.SingleNodeMultiWriter)))
		return meta.Command{Attach: &meta.Attach{
			Volume: id, Node: nodeID(n), Mode: mode, ReadOnly: d.HasArg("ro"), Epoch: epoch,
			IfRevision: meta.Revision(number(t, d, "rev")), With: trivet.NodeID(word(t, d, "with", "")),
		}}
	case "takeover":
		c := &meta.TakeOver{Volume: id, Node: nodeID(n)}
		if d.HasArg("i") {
			c.Incarnation = incarnation(number(t, d, "i"))
		}
		return meta.Command{TakeOver: c}
	case "detach":
		c := &meta.Detach{
			Volume: id, Epoch: epoch, IfRevision: meta.Revision(number(t, d, "rev")), Forced: d.HasArg("forced"),
		}
		if n != 0 {
			c.Node = nodeID(n)
		}
		return meta.Command{Detach: c}
	case "fence":
		return meta.Command{ReportFence: &meta.ReportFence{Volume: id, Epoch: epoch}}
	case "leader":
		return meta.Command{ReportLeader: &meta.ReportLeader{
			Volume: id, Replica: replicaID(v*10 + n), Term: uint64(number(t, d, "term")),
		}}
	case "want":
		return meta.Command{WantLeader: &meta.WantLeader{Volume: id, Replica: replicaID(v*10 + n)}}
	case "release":
		return meta.Command{Release: &meta.Release{
			Volume: id, Discard: d.HasArg("discard"), SkipWipe: d.HasArg("skip"),
		}}
	case "reclaim":
		return meta.Command{Reclaim: &meta.Reclaim{Volume: id, Policy: policy}}
	case "wiped":
		return meta.Command{ReportWiped: &meta.ReportWiped{Volume: id, Epoch: epoch}}
	case "fail":
		return meta.Command{Fail: &meta.Fail{Volume: id, Reason: word(t, d, "reason", "broken")}}
	case "register":
		nd := node(n)
		nd.Incarnation = incarnation(number(t, d, "i"))
		if disk := number(t, d, "disk"); disk != 0 {
			nd.Disks[0].ID = diskID(disk)
		}
		return meta.Command{RegisterNode: &meta.RegisterNode{Node: nd}}
	}
	return membership(t, m, d, v, n)
}

// membership is scripted for the commands that change the members of a volume, and the nodes.
func membership(t *testing.T, m *meta.Machine, d *datadriven.TestData, v, n int) meta.Command {
	id := trivet.VolumeID(v)
	rev := meta.Revision(number(t, d, "rev"))
	if now, ok := m.State().Volume(id); ok && rev == 0 {
		rev = now.Revision
	}
	switch d.Cmd {
	case "add":
		as, disk := n, n
		d.MaybeScanArgs(t, "as", &as)
		d.MaybeScanArgs(t, "disk", &disk)
		r := meta.Replica{ID: replicaID(v*10 + as), Node: nodeID(n), Disk: diskID(disk)}
		if old := number(t, d, "replaces"); old != 0 {
			r.Replaces = replicaID(v*10 + old)
		}
		return meta.Command{AddReplica: &meta.AddReplica{Volume: id, Replica: r, IfRevision: rev}}
	case "remove":
		return meta.Command{RemoveReplica: &meta.RemoveReplica{
			Volume: id, Replica: replicaID(v*10 + n), IfRevision: rev,
		}}
	case "count":
		return meta.Command{SetReplicas: &meta.SetReplicas{Volume: id, Count: number(t, d, "to")}}
	case "params":
		p := &meta.SetParams{Volume: id, Params: map[string]string{}, IfRevision: meta.Revision(number(t, d, "rev"))}
		for _, line := range strings.Fields(d.Input) {
			key, value, _ := strings.Cut(line, "=")
			p.Params[key] = value
		}
		return meta.Command{SetParams: p}
	case "recover":
		return meta.Command{RecoverVolume: &meta.RecoverVolume{
			Volume: id, Replica: replicaID(v*10 + n), IfRevision: max(rev, 1), Detail: "by hand",
		}}
	case "recovered":
		return meta.Command{ReportRecovered: &meta.ReportRecovered{Volume: id, Replica: replicaID(v*10 + n)}}
	case "grow":
		return meta.Command{GrowVolume: &meta.GrowVolume{
			Volume: id, SizeBytes: int64(number(t, d, "to")) << 30, IfRevision: rev,
		}}
	case "sized":
		return meta.Command{ReportSize: &meta.ReportSize{Volume: id, SizeBytes: int64(number(t, d, "to")) << 30}}
	case "cordon", "uncordon":
		on := d.Cmd == "cordon"
		return meta.Command{CordonNode: &meta.CordonNode{Node: nodeID(n), Cordoned: on, Draining: d.HasArg("drain")}}
	}
	if d.Cmd == "forget" {
		f := &meta.ForgetNode{Node: nodeID(n), Time: day.Add(time.Hour), Allow: d.HasArg("allow")}
		if d.HasArg("alive") {
			f.Time = day.Add(-time.Second)
		}
		return meta.Command{ForgetNode: f}
	}
	t.Fatalf("%s: unknown command %q", d.Pos, d.Cmd)
	return meta.Command{}
}

func auditText(t *testing.T, s *meta.State) string {
	require.NoError(t, s.Audit().Verify())
	b := &strings.Builder{}
	for _, r := range s.Audit().Records {
		fmt.Fprintf(b, "%d %s by=%s %s %s node=%s: %s\n", r.Seq, r.Kind, r.By, r.Volume, r.Name, r.Node, r.Detail)
	}
	return b.String()
}

func line(v *meta.Volume) string {
	if v == nil {
		return "-\n"
	}
	b := &strings.Builder{}
	fmt.Fprintf(b, "v%d %s epoch=%d fenced=%d", uint64(v.ID), v.Phase, v.Epoch, v.FencedEpoch)
	if a := v.Attached; a != nil {
		fmt.Fprintf(b, " attached=%s@%d", a.Node, a.Epoch)
		if a.ReadOnly {
			b.WriteString("(ro)")
		}
		if v.Usable(a.Node, a.Epoch) {
			b.WriteString(" usable")
		}
	}
	for _, a := range v.Also {
		fmt.Fprintf(b, " also=%s@%d", a.Node, a.Epoch)
		if v.Usable(a.Node, a.Epoch) {
			b.WriteString(" usable")
		}
	}
	if v.Detaching != "" {
		fmt.Fprintf(b, " detaching=%s", v.Detaching)
	}
	if v.Leaving != "" {
		fmt.Fprintf(b, " leaving=%s", v.Leaving)
	}
	if w := v.Writers(); w[0] != v.Epoch || w[1] != 0 {
		fmt.Fprintf(b, " writers=%d", w)
	}
	for _, r := range v.Replicas {
		fmt.Fprintf(b, " %s:%s", r.Node, r.State)
		if r.ID == v.Leader {
			b.WriteString("(leads)")
		}
		if r.ID == v.WantLeader {
			b.WriteString("(wanted)")
		}
	}
	if v.Leader != "" && v.Replica(v.Leader) == nil {
		b.WriteString(" led by nobody")
	}
	for _, r := range v.Retired {
		fmt.Fprintf(b, " retired=%s:%s", r.Node, r.State)
	}
	if v.Want() != len(v.Replicas) {
		fmt.Fprintf(b, " want=%d", v.Want())
	}
	for _, k := range slices.Sorted(maps.Keys(v.Params)) {
		if k != "replicas" { // which each of them has
			fmt.Fprintf(b, " %s=%s", k, v.Params[k])
		}
	}
	if v.Growing() || v.Start() != v.SizeBytes {
		fmt.Fprintf(b, " size=%d→%d→%d", v.Start()>>30, v.SizeBytes>>30, max(v.SizeBytes, v.WantSizeBytes)>>30)
	}
	if v.Recover != "" {
		fmt.Fprintf(b, " recover=%s", v.Replica(v.Recover).Node)
	}
	if v.ThenDelete {
		b.WriteString(" then delete")
	}
	if v.Reason != "" {
		fmt.Fprintf(b, " reason=%q", v.Reason)
	}
	return b.String() + "\n"
}

func describe(s *meta.State) string {
	out := fmt.Sprintf("revision %d\n", s.Revision())
	for _, id := range s.AllForgotten() {
		out += fmt.Sprintf("forgotten %s\n", id)
	}
	for _, v := range s.Volumes() {
		out += line(&v)
	}
	return out
}
