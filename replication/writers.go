package replication

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/trivet-csi/trivet"
)

// Two may write a volume at an epoch (docs/decisions/0030). Each has a number and a session: the sequences that its one
// Volume counts, from one. A fence names the sessions of its epoch. A session that goes on keeps its window, so that a
// request which was in before the fence, and is sent again after it, is known as a copy (H39).

const (
	// WritersMax is how many may write a volume at an epoch.
	WritersMax = 2
	// writerBit of seq and low is the number of the writer.
	writerBit = uint64(1) << 63
)

// Writers are the sessions that may write at an epoch: by the number of the writer, the epoch at which its session
// began. Zero: nobody has that number. A number and an epoch name one session for ever.
type Writers [WritersMax]trivet.Epoch

// Alone returns the Writers of an epoch at which one writes whose session begins with it.
func Alone(epoch trivet.Epoch) Writers { return Writers{epoch} }

// check returns ErrInvalid unless w can be the sessions of an epoch.
func (w Writers) check(epoch trivet.Epoch) error {
	if w == (Writers{}) {
		return fmt.Errorf("fence at epoch %d names no writer: %w", epoch, trivet.ErrInvalid)
	}
	for i, since := range w {
		if since > epoch {
			return fmt.Errorf("session of writer %d begins at epoch %d, after its fence at %d: %w", i, since, epoch,
				trivet.ErrInvalid)
		}
	}
	return nil
}

// writerOf takes a seq or a low apart.
func writerOf(seq uint64) (writer int, n uint64) { return int(seq >> 63), seq &^ writerBit }

// windowOf returns the window of a writer; nil: the fence has not named it.
func (c *core) windowOf(writer int) *window {
	if writer == 0 {
		return c.win
	}
	return c.win1
}

// begin makes w the sessions of the core's epoch: those that go on keep their windows. A fence in between may have been
// skipped, so what goes on is told by when it began, not by what the fence before this one was.
func (c *core) begin(w Writers) {
	next := [WritersMax]*window{}
	for i, since := range w {
		switch {
		case since == 0:
		case c.windowOf(i) != nil && c.since[i] == since:
			next[i] = c.windowOf(i)
		default:
			next[i] = newWindow()
		}
	}
	c.win, c.win1, c.since = next[0], next[1], w
}

// fenceWriters raises the epoch, never lowers it (I7). The same epoch again has no effect: in particular it leaves the
// sessions alone, which the attachments may be using already.
func (c *core) fenceWriters(epoch trivet.Epoch, w Writers) outcome {
	switch {
	case epoch < c.epoch:
		return outFenced
	case epoch == c.epoch:
		return outDuplicate
	}
	c.epoch = epoch
	c.begin(w)
	return outApplied
}

// The sessions of one writer, with number 0, that began with the epoch of the state are version 1 (window.go). All
// others are version 2. Big endian; the encoding is canonical.
//
//	0         1         2       10     18    20
//	+---------+---------+-------+------+-----+--------------------+-----------------
//	| version | writers | since | mark | n   | states, as in      | the same of
//	| 2       | bits    | 8     | 8    | 2   | version 1          | writer 1
//	+---------+---------+-------+------+-----+--------------------+-----------------
//
// writers has a bit for each number that somebody has; since to states are there for each of these.
const (
	sessionsVersion  = 2
	bothWriters      = 1<<WritersMax - 1
	sessionFixedSize = 8 + windowFixedBytes
)

// appendSessions encodes the windows of c.
func (c *core) appendSessions(dst []byte) []byte {
	if c.win1 == nil && c.win != nil && c.since[0] == c.epoch {
		return c.win.append(dst)
	}
	at := len(dst)
	dst = append(dst, sessionsVersion, 0)
	for i := range WritersMax {
		if win := c.windowOf(i); win != nil {
			dst[at+1] |= 1 << i
			dst = binary.BigEndian.AppendUint64(dst, uint64(c.since[i]))
			dst = win.appendBody(dst)
		}
	}
	return dst
}

// loadSessions is the inverse of appendSessions, for a core with its epoch set; empty input is one new window. Anything
// that appendSessions does not make is ErrCorrupt.
func (c *core) loadSessions(b []byte) error {
	c.win, c.win1, c.since = nil, nil, Writers{}
	if len(b) == 0 || b[0] != sessionsVersion {
		win, err := decodeWindow(b)
		c.win, c.since = win, Alone(c.epoch)
		return err
	}
	if len(b) < 2 || b[1] == 0 || b[1] > bothWriters {
		return fmt.Errorf("sessions of %d bytes say writers %x: %w", len(b), b[1:min(len(b), 2)], trivet.ErrCorrupt)
	}
	names, rest := b[1], b[2:]
	for i := range WritersMax {
		if names>>i&1 == 0 {
			continue
		}
		if len(rest) < sessionFixedSize {
			return fmt.Errorf("sessions of %d bytes end before writer %d: %w", len(b), i, trivet.ErrCorrupt)
		}
		c.since[i] = trivet.Epoch(binary.BigEndian.Uint64(rest))
		win, after, err := decodeWindowBody(rest[8:])
		if err != nil {
			return fmt.Errorf("writer %d: %w", i, err)
		}
		if rest = after; i == 0 {
			c.win = win
		} else {
			c.win1 = win
		}
		if c.since[i] == 0 || c.since[i] > c.epoch {
			return fmt.Errorf("session of writer %d began at epoch %d, the state has %d: %w", i, c.since[i], c.epoch,
				trivet.ErrCorrupt)
		}
	}
	if len(rest) != 0 || names == 1 && c.since[0] == c.epoch {
		return fmt.Errorf("sessions of writers %x since %v at epoch %d, %d bytes follow: %w", names, c.since, c.epoch,
			len(rest), trivet.ErrCorrupt)
	}
	return nil
}

// manyWrite reports whether encoded sessions are of more writers than one.
func manyWrite(sessions []byte) bool {
	return len(sessions) > 1 && sessions[0] == sessionsVersion && sessions[1] == bothWriters
}

// FenceWriters is Fence for an epoch at which the given sessions may write. One that goes on, from the epoch that the
// volume had, keeps its window: what it sends again after the fence happens once. What it has under way is refused
// as fenced; see VolumeConfig.Renew. Errors as of Fence, and ErrInvalid for sessions that cannot be.
func (r *Replica) FenceWriters(ctx context.Context, epoch trivet.Epoch, w Writers) error {
	if w == Alone(epoch) {
		return r.Fence(ctx, epoch)
	}
	return r.fence(ctx, &request{op: opFenceWriters, epoch: epoch, seq: uint64(w[0]), low: uint64(w[1])})
}
