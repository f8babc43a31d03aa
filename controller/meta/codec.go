package meta

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/trivet-csi/trivet"
)

// CommandBytesMax bounds an encoded command. A node with a thousand disks fits.
const CommandBytesMax = 1 << 20

// A command on the wire and in the log:
//
//	+---------+------------------------------------------+
//	| version | JSON object with exactly one of Command's |
//	|  1 byte | fields; unknown fields are refused        |
//	+---------+------------------------------------------+
//
// A member that meets a version or a field it does not know must stop: skipping it would make its
// state differ from the others'.
const commandVersion = 1

// Encode returns c in the form that Decode reads. It returns ErrInvalid for a command that Validate
// refuses.
func (c Command) Encode() ([]byte, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	body, err := json.Marshal(c.utc())
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w: %w", c.Op(), err, trivet.ErrInvalid)
	}
	if len(body)+1 > CommandBytesMax {
		return nil, fmt.Errorf("encode %s: %d bytes, at most %d are allowed: %w",
			c.Op(), len(body)+1, CommandBytesMax, trivet.ErrInvalid)
	}
	return append([]byte{commandVersion}, body...), nil
}

// utc returns c with its times in UTC: RFC 3339 drops the seconds of a zone's offset.
func (c Command) utc() Command {
	c.Time = instant(c.Time)
	switch {
	case c.InitCluster != nil:
		i := *c.InitCluster
		i.Time = instant(i.Time)
		c.InitCluster = &i
	case c.RegisterNode != nil:
		r := *c.RegisterNode
		r.Node.LeaseUntil = instant(r.Node.LeaseUntil)
		c.RegisterNode = &r
	case c.RenewLease != nil:
		r := *c.RenewLease
		r.Until = instant(r.Until)
		c.RenewLease = &r
	case c.CreateVolume != nil:
		v := *c.CreateVolume
		v.Volume.Created = instant(v.Volume.Created)
		c.CreateVolume = &v
	case c.CreateSnapshot != nil:
		s := *c.CreateSnapshot
		s.Snapshot.Created = instant(s.Snapshot.Created)
		c.CreateSnapshot = &s
	case c.CreateSnapshotGroup != nil:
		g := *c.CreateSnapshotGroup
		g.Created = instant(g.Created)
		c.CreateSnapshotGroup = &g
	case c.StartScrub != nil:
		s := *c.StartScrub
		s.Time = instant(s.Time)
		c.StartScrub = &s
	case c.ReportScrub != nil:
		s := *c.ReportScrub
		s.Time = instant(s.Time)
		c.ReportScrub = &s
	}
	return c
}

// Decode is the inverse of Encode. It returns ErrInvalid for anything that Encode does not write; it
// keeps nothing of b.
func Decode(b []byte) (Command, error) {
	if len(b) == 0 || len(b) > CommandBytesMax {
		return Command{}, fmt.Errorf("decode command: %d bytes, want 1 to %d: %w", len(b), CommandBytesMax, trivet.ErrInvalid)
	}
	if b[0] != commandVersion {
		return Command{}, fmt.Errorf("decode command: version %d, this program knows %d: %w",
			b[0], commandVersion, trivet.ErrInvalid)
	}
	var c Command
	if err := decodeStrict(b[1:], &c); err != nil {
		return Command{}, fmt.Errorf("decode command: %w: %w", err, trivet.ErrInvalid)
	}
	if err := c.Validate(); err != nil {
		return Command{}, fmt.Errorf("decode command: %w", err)
	}
	return c, nil
}

// decodeStrict reads exactly one JSON value without unknown fields.
func decodeStrict(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("bytes follow the JSON value")
	}
	return nil
}
