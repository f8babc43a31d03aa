package meta

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
)

// auditMax is how many audit records the catalogue keeps. The hash of the one before the oldest stays, so that
// those that are left can still be verified.
const auditMax = 1024

// AuditKind is what an audit record is about.
type AuditKind string

// The kinds of audit records.
const (
	AuditDelete        AuditKind = "delete"         // it was decided to delete a volume
	AuditDeleted       AuditKind = "deleted"        // its last replica is removed; the record of the volume is gone
	AuditRecycle       AuditKind = "recycle"        // it was decided to wipe a volume, to be used again
	AuditWipe          AuditKind = "wipe"           // a volume was wiped: a majority of its replicas has only zeroes
	AuditForcedDetach  AuditKind = "forced-detach"  // a volume was taken from a node that did not let go of it
	AuditRecover       AuditKind = "recover"        // the majority of a group was given up
	AuditNodeForgotten AuditKind = "node-forgotten" // a node was taken off the catalogue
)

// AuditRecord says what was done to data that cannot be undone, when, and by whom. Hash is over the record and the
// hash of the one before, so none can be changed, left out or put in between without changing all that follow.
type AuditRecord struct {
	Seq    uint64          `json:"seq"`  // 1 for the first of the cluster, without gaps
	Time   time.Time       `json:"time"` // by the clock of the node that proposed it; UTC; zero = it did not say
	Kind   AuditKind       `json:"kind"`
	By     trivet.NodeID   `json:"by,omitempty"`     // the node that proposed it
	Volume trivet.VolumeID `json:"volume,omitempty"` // 0 = not about one
	Name   string          `json:"name,omitempty"`   // of the volume
	Node   trivet.NodeID   `json:"node,omitempty"`   // that it is about
	Detail string          `json:"detail,omitempty"`
	Hash   string          `json:"hash"` // SHA-256, in hexadecimal
}

// chain returns the hash of the record after one with the hash before, which is empty for the first.
//
//	SHA-256( hash before, as hexadecimal text | JSON of the record with an empty hash )
func (r AuditRecord) chain(before string) (string, error) {
	r.Hash = ""
	r.Time = instant(r.Time)
	b, err := json.Marshal(r)
	if err != nil {
		return "", fmt.Errorf("hash audit record %d: %w", r.Seq, err)
	}
	h := sha256.New()
	h.Write([]byte(before))
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Audit is what the catalogue keeps of what was done: the newest records, oldest first.
type Audit struct {
	// Base is the hash of the record before the oldest; empty when that is the first of the cluster.
	Base    string        `json:"base,omitempty"`
	Records []AuditRecord `json:"records,omitempty"`
}

// Head returns the sequence and the hash of the newest record; 0 and "" when there was none. Who writes them down
// somewhere else can tell later that nothing before was changed.
func (a Audit) Head() (seq uint64, hash string) {
	if n := len(a.Records); n > 0 {
		return a.Records[n-1].Seq, a.Records[n-1].Hash
	}
	return 0, ""
}

// Verify returns ErrCorrupt, naming the record, unless every record follows from the one before.
func (a Audit) Verify() error {
	before := a.Base
	for i, r := range a.Records {
		switch {
		case i == 0 && (r.Seq == 0 || (r.Seq == 1) != (a.Base == "")):
			return fmt.Errorf("audit: record %d is the oldest, with %q before it: %w", r.Seq, a.Base, trivet.ErrCorrupt)
		case i > 0 && r.Seq != a.Records[i-1].Seq+1:
			return fmt.Errorf("audit: record %d follows on %d: %w", r.Seq, a.Records[i-1].Seq, trivet.ErrCorrupt)
		}
		hash, err := r.chain(before)
		if err != nil {
			return err
		}
		if hash != r.Hash {
			return fmt.Errorf("audit: record %d has hash %s, want %s: %w", r.Seq, r.Hash, hash, trivet.ErrCorrupt)
		}
		before = hash
	}
	return nil
}

// auditLog is Audit as a State has it: records are never changed, and the list is replaced as a whole.
type auditLog struct {
	base    string
	records []*AuditRecord
}

// Audit returns what was done to data that cannot be undone.
func (s *State) Audit() Audit {
	out := Audit{Base: s.audit.base}
	for _, r := range s.audit.records {
		out.Records = append(out.Records, *r)
	}
	return out
}

// auditLogOf is the inverse of State.Audit. ErrCorrupt: the records do not follow from each other.
func auditLogOf(a Audit) (auditLog, error) {
	if len(a.Records) > auditMax || len(a.Records) == 0 && a.Base != "" {
		return auditLog{}, fmt.Errorf("audit: %d records with %q before them: %w", len(a.Records), a.Base, trivet.ErrCorrupt)
	}
	if err := a.Verify(); err != nil {
		return auditLog{}, err
	}
	l := auditLog{base: a.Base}
	for i := range a.Records {
		r := a.Records[i]
		r.Time = instant(r.Time)
		l.records = append(l.records, &r)
	}
	return l, nil
}

// record appends a record about a volume, which may be nil. The draft is changed by it.
func (d *draft) record(kind AuditKind, v *Volume, node trivet.NodeID, detail string) error {
	r := &AuditRecord{Seq: 1, Time: d.at, Kind: kind, By: d.by, Node: node, Detail: detail}
	if v != nil {
		r.Volume, r.Name = v.ID, v.Name
	}
	before := d.audit.base
	if n := len(d.audit.records); n > 0 {
		last := d.audit.records[n-1]
		r.Seq, before = last.Seq+1, last.Hash
	}
	var err error
	if r.Hash, err = r.chain(before); err != nil {
		return err
	}
	l := auditLog{base: d.audit.base, records: append(slices.Clone(d.audit.records), r)}
	if n := len(l.records) - auditMax; n > 0 {
		l.base = l.records[n-1].Hash
		l.records = slices.Delete(l.records, 0, n)
	}
	d.audit, d.changed = l, true
	return nil
}

// Audited reports whether the command leaves a record, so that it has to say when it was proposed, and by whom.
func (c *Command) Audited() bool {
	switch {
	case c.RecoverVolume != nil, c.RecoverCatalogue != nil, c.Release != nil, c.Reclaim != nil, c.ReportWiped != nil:
		return true
	case c.ReportReplica != nil:
		return c.ReportReplica.State == ReplicaRemoved
	case c.Detach != nil:
		return c.Detach.Forced
	case c.ForgetNode != nil:
		return !c.ForgetNode.Allow
	}
	return false
}

// validateStamp checks what a command says of itself.
func (c *Command) validateStamp() error {
	if c.By != "" {
		if err := trivet.ValidateNodeID(string(c.By)); err != nil {
			return err
		}
	}
	if c.Time.IsZero() {
		return nil
	}
	return validateTime("time", c.Time)
}
