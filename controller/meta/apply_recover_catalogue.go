package meta

import (
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
)

func (r *RecoverCatalogue) op() string {
	return fmt.Sprintf("recover the catalogue from its member on %s", r.Node)
}

func (r *RecoverCatalogue) validate() error {
	err := firstError(trivet.ValidateNodeID(string(r.Node)), validateText("detail", r.Detail, reasonBytesMax))
	for _, k := range r.Kept {
		err = firstError(err, validateUUID("kept member", string(k)))
	}
	if err == nil && len(r.Kept) == 0 {
		err = fmt.Errorf("no member is kept: %w", trivet.ErrInvalid)
	}
	return err
}

func (r *RecoverCatalogue) apply(d *draft) error {
	lost := 0
	for _, n := range d.Nodes() {
		if n.MetaReplica != "" && !slices.Contains(r.Kept, n.MetaReplica) {
			lost++
			n.MetaReplica = ""
			d.putNode(&n)
		}
	}
	text := "catalogue: " + r.Detail
	if n := len(d.audit.records); lost == 0 && n > 0 && d.audit.records[n-1].Detail == text {
		return nil // sent again
	}
	return d.record(AuditRecover, nil, r.Node, text)
}

// Strays reports whether a node is known with a member of the meta group that is none of these.
func (s *State) Strays(members []trivet.ReplicaID) bool {
	return slices.ContainsFunc(s.Nodes(), func(n Node) bool {
		return n.MetaReplica != "" && !slices.Contains(members, n.MetaReplica)
	})
}
