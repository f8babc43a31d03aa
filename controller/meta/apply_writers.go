package meta

import (
	"fmt"

	"github.com/trivet-csi/trivet"
)

// Two writers (decision 0030). Both have MultiNodeMultiWriter and the volume's epoch. Who comes, goes, or is taken over
// by a new process reserves the next epoch, which the other one goes on at: its session, and so what its node has under
// way, outlives the fence.
//
//	Attached=n1@3 Epoch=3 Fenced=3                                    n1 writes, as writer 0
//	  Attach n2 ──► Attached=n1@4 since 3, Also=n2@4 Epoch=4            n1 waits for the fence as n2 does
//	  ReportFence 4 ──► Fenced=4                                      both write
//	  Detach n1 ──► Attached=n2@5 since 4, Leaving=n1 Epoch=5          n2 is writer 1 still
//	  ReportFence 5 ──► Fenced=5, Leaving empty                       n1 can write no more
//	  Attach n3 ──► Attached=n2@6 since 4, Also=n3@6 Epoch=6            n3 is writer 0
//
// Invariant: Leaving: FencedEpoch < Epoch, and one at most is attached; nobody can join.

// WritersMax is how many nodes may write a volume at a time.
const WritersMax = 2

// Session returns the epoch at which the session of this attachment began: its writer counts its writes from there. It
// is Epoch unless another writer has come or gone since.
func (a *Attachment) Session() trivet.Epoch {
	if a.Since != 0 {
		return a.Since
	}
	return a.Epoch
}

// goOn moves the attachment to a new epoch, with the session that it has.
func (a *Attachment) goOn(epoch trivet.Epoch) { a.Since, a.Epoch = a.Session(), epoch }

// Writers returns the sessions that a fence of Epoch has to name: by the number of the writer, the epoch at which its
// session began; zero: nobody has that number. One alone that began with Epoch, or nobody at all, is writer 0.
func (v *Volume) Writers() [WritersMax]trivet.Epoch {
	var w [WritersMax]trivet.Epoch
	if v.Attached == nil || v.Attached.Mode != MultiNodeMultiWriter {
		w[0] = v.Epoch
		return w
	}
	w[v.Attached.Writer] = v.Attached.Session()
	for i := range v.Also {
		w[v.Also[i].Writer] = v.Also[i].Session()
	}
	return w
}

// admitsWriter says why want cannot write beside the one that does, if it cannot. REQUIRES: both modes are
// MultiNodeMultiWriter, and want's node holds nothing.
func (v *Volume) admitsWriter(want *Attachment) error {
	held := v.Attached
	switch {
	case len(v.Also) > 0:
		return fmt.Errorf("held by %s: %w", v.holderText(), trivet.ErrInUse)
	case held.With != "" && held.With != want.Node:
		return fmt.Errorf("held by %s, which shares it with %s only: %w", v.holderText(), held.With, trivet.ErrInUse)
	case want.With != "" && want.With != held.Node:
		return fmt.Errorf("held by %s, and wanted together with %s: %w", v.holderText(), want.With, trivet.ErrInUse)
	}
	return nil
}

// joinWriter lets want write beside the one that does. REQUIRES: admitsWriter.
func (v *Volume) joinWriter(want Attachment) {
	v.Epoch++
	v.Attached.goOn(v.Epoch)
	want.Epoch, want.Writer = v.Epoch, 1-v.Attached.Writer
	v.Also = []Attachment{want}
}

// dropWriter takes one of two writers off. REQUIRES: node is one of two.
func (v *Volume) dropWriter(node trivet.NodeID) {
	v.dropReader(node)
	v.Epoch++
	v.Attached.goOn(v.Epoch)
	v.Leaving = node
}

// letGo takes all off who are attached, with a fence to come. REQUIRES: the epoch was raised for it.
func (v *Volume) letGo(last trivet.NodeID) {
	for i := range v.Also {
		if a := &v.Also[i]; a.Mode == MultiNodeMultiWriter && a.Node != last {
			v.Leaving = a.Node
		}
	}
	v.Attached, v.Also, v.Detaching = nil, nil, last
}

// renewWriter gives a new process of held's node a session of its own, and lets the other writer, if there is one, go
// on.
func (v *Volume) renewWriter(held *Attachment) {
	v.Epoch++
	v.Attached.goOn(v.Epoch)
	for i := range v.Also {
		v.Also[i].goOn(v.Epoch)
	}
	held.Since = 0
}

// writersProblem names the first invariant that the writers of v break.
func (v *Volume) writersProblem() string {
	if v.Leaving != "" && (v.FencedEpoch == v.Epoch || len(v.Also) > 0 || v.Holder() == "" || v.Holder() == v.Leaving) {
		return fmt.Sprintf("%s is leaving, held by %s, fenced at %d of %d",
			v.Leaving, v.holderNames(), v.FencedEpoch, v.Epoch)
	}
	if v.Attached == nil {
		return ""
	}
	seen := [WritersMax]bool{}
	for _, a := range append([]Attachment{*v.Attached}, v.Also...) {
		if a.Mode != MultiNodeMultiWriter {
			if a.Since != 0 || a.Writer != 0 || a.With != "" {
				return fmt.Sprintf("attached to %s as %s, writer %d since epoch %d", a.Node, a.Mode, a.Writer, a.Since)
			}
			continue
		}
		if a.ReadOnly || a.Since > a.Epoch || a.Writer < 0 || a.Writer >= WritersMax || seen[a.Writer] {
			return fmt.Sprintf("attached to %s as writer %d since epoch %d of %d, read-only %t", a.Node, a.Writer, a.Since,
				a.Epoch, a.ReadOnly)
		}
		seen[a.Writer] = true
	}
	return ""
}
