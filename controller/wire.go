package controller

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// A request to the leader, KindMetaPropose or KindMetaRead:
//
//	+---------+--------+------------------------------------------+
//	| version | op     | body: a command (meta.Command.Encode), or |
//	| 1 byte  | 1 byte | JSON of addMember, or nothing             |
//	+---------+--------+------------------------------------------+
//
// The replies are, after a version byte: JSON of wireResult, nothing, and an index (8 bytes, big
// endian). What the transport carries as an error is about the request (no leader, not allowed); a
// refusal by the state machine is a result.
const wireVersion = 1

// The operations.
const (
	opCommand   = 1
	opAddMember = 2
	opRead      = 3
	opLogEnd    = 4 // asked of any member, with KindMetaRead (catalogue_recover.go)
)

type request struct {
	op   uint8
	body []byte
}

func (r request) encode() []byte { return append([]byte{wireVersion, r.op}, r.body...) }

// decodeRequest returns ErrInvalid for what encode does not write. The body aliases b.
func decodeRequest(b []byte) (request, error) {
	if len(b) < 2 || b[0] != wireVersion {
		return request{}, fmt.Errorf("request of %d bytes: unknown version: %w", len(b), trivet.ErrInvalid)
	}
	return request{op: b[1], body: b[2:]}, nil
}

func encodeIndex(index uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{wireVersion}, index)
}

func decodeIndex(b []byte) (uint64, error) {
	if len(b) != 9 || b[0] != wireVersion {
		return 0, fmt.Errorf("reply of %d bytes is no index: %w", len(b), trivet.ErrInvalid)
	}
	return binary.BigEndian.Uint64(b[1:]), nil
}

// wireResult is a meta.Result on the wire.
type wireResult struct {
	Revision meta.Revision       `json:"revision"`
	Volume   *meta.Volume        `json:"volume,omitempty"`
	Node     *meta.Node          `json:"node,omitempty"`
	Snapshot *meta.Snapshot      `json:"snapshot,omitempty"`
	Group    *meta.SnapshotGroup `json:"group,omitempty"`
	Error    string              `json:"error,omitempty"`
	Kinds    []string            `json:"kinds,omitempty"` // sentinels that the error wraps
}

// sentinels are the refusals of the state machine, by their names on the wire.
var sentinels = []struct {
	name string
	err  error
}{
	{"notFound", trivet.ErrNotFound},
	{"exists", trivet.ErrExists},
	{"inUse", trivet.ErrInUse},
	{"fenced", trivet.ErrFenced},
	{"pending", trivet.ErrPending},
	{"noSpace", trivet.ErrNoSpace},
	{"outOfRange", trivet.ErrOutOfRange},
	{"invalid", trivet.ErrInvalid},
}

// refusal is a state machine's error that came over the wire.
type refusal struct {
	text  string
	kinds []error
}

func (r *refusal) Error() string   { return r.text }
func (r *refusal) Unwrap() []error { return r.kinds }

func encodeResult(res meta.Result) ([]byte, error) {
	w := wireResult{Revision: res.Revision, Volume: res.Volume, Node: res.Node, Snapshot: res.Snapshot, Group: res.Group}
	if res.Err != nil {
		w.Error = res.Err.Error()
		for _, s := range sentinels {
			if errors.Is(res.Err, s.err) {
				w.Kinds = append(w.Kinds, s.name)
			}
		}
	}
	body, err := json.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("encode result at revision %d: %w", res.Revision, err)
	}
	return append([]byte{wireVersion}, body...), nil
}

// decodeResult reads a result. Unknown fields are ignored: the leader may be newer.
func decodeResult(b []byte) (meta.Result, error) {
	if len(b) == 0 || b[0] != wireVersion {
		return meta.Result{}, fmt.Errorf("result of %d bytes: unknown version: %w", len(b), trivet.ErrInvalid)
	}
	var w wireResult
	if err := json.Unmarshal(b[1:], &w); err != nil {
		return meta.Result{}, fmt.Errorf("result: %w: %w", err, trivet.ErrInvalid)
	}
	res := meta.Result{Revision: w.Revision, Volume: w.Volume, Node: w.Node, Snapshot: w.Snapshot, Group: w.Group}
	if w.Error != "" || len(w.Kinds) > 0 {
		r := &refusal{text: w.Error}
		for _, s := range sentinels {
			for _, k := range w.Kinds {
				if k == s.name {
					r.kinds = append(r.kinds, s.err)
				}
			}
		}
		res.Err = r
	}
	return res, nil
}

func (a addMember) encode() ([]byte, error) { return json.Marshal(a) }

func decodeAddMember(b []byte) (addMember, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var a addMember
	if err := d.Decode(&a); err != nil {
		return a, fmt.Errorf("add member: %w: %w", err, trivet.ErrInvalid)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return a, fmt.Errorf("add member: bytes follow: %w", trivet.ErrInvalid)
	}
	return a, a.validate()
}
