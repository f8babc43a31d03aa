package replication

import (
	"encoding/binary"
	"fmt"

	"github.com/trivet-csi/trivet"
)

// windowN is how many sequences above its mark a window remembers. A client has at most this many
// sequences between its lowest open one and its highest, so it never meets the limit.
const windowN = 4096

// seqState is what a window knows of a sequence. Values are part of the format.
type seqState uint8

const (
	seqUnseen  seqState = 0
	seqApplied seqState = 1
	seqRefused seqState = 2 // answered with ErrOutOfRange: a late copy must not be applied either
)

// window remembers which sequences of a writer's session were applied, so that each is applied at
// most once, and none after its client had its answer and went on (H39).
//
// Invariant: every sequence below mark is settled: it was applied, refused, or never will be.
// Sequences from mark to high-1 have a state; those from high on are unseen; high-mark <= windowN.
//
// A window is part of the replicated state: equal logs make equal windows and equal bytes.
// The zero value is not usable; see newWindow.
type window struct {
	mark  uint64 // highest low seen; sequences below are refused
	high  uint64 // one above the highest sequence seen, at least mark
	state [windowN]seqState
}

func newWindow() *window { return &window{mark: 1, high: 1} }

// raise moves the mark up to low: the client has its answer to every sequence below.
func (w *window) raise(low uint64) {
	if low <= w.mark {
		return
	}
	for s := w.mark; s < min(low, w.high); s++ {
		w.state[s%windowN] = seqUnseen
	}
	w.mark = low
	w.high = max(w.high, low)
}

// lookup returns the state of seq. ok is false when seq is outside the window: below the mark, or
// windowN or more above it. Call raise first.
func (w *window) lookup(seq uint64) (st seqState, ok bool) {
	switch {
	case seq < w.mark || seq-w.mark >= windowN:
		return seqUnseen, false
	case seq >= w.high:
		return seqUnseen, true
	}
	return w.state[seq%windowN], true
}

// settle records the state of an unseen sequence. REQUIRES: lookup(seq) returned seqUnseen, true.
func (w *window) settle(seq uint64, st seqState) {
	w.state[seq%windowN] = st
	w.high = max(w.high, seq+1)
}

// The encoding is canonical: one window has one encoding. Big endian.
//
//	0         1      9         11
//	+---------+------+---------+-------------------------------------------+
//	| version | mark | n       | states of mark .. mark+n-1, 2 bits each,  |
//	| 1       | 8    | 2       | lowest bits first, zero padded            |
//	+---------+------+---------+-------------------------------------------+
//
// Sessions of version 2 (writers.go) have what follows the version, too.
const (
	windowVersion     = 1
	windowFixedBytes  = 10
	windowHeaderBytes = 1 + windowFixedBytes
)

// append encodes w.
func (w *window) append(dst []byte) []byte { return w.appendBody(append(dst, windowVersion)) }

// appendBody encodes w without a version.
func (w *window) appendBody(dst []byte) []byte {
	n := w.high - w.mark
	dst = binary.BigEndian.AppendUint64(dst, w.mark)
	dst = binary.BigEndian.AppendUint16(dst, uint16(n))
	at := len(dst)
	dst = append(dst, make([]byte, (n+3)/4)...)
	for i := range n {
		dst[at+int(i/4)] |= byte(w.state[(w.mark+i)%windowN]) << (2 * (i % 4))
	}
	return dst
}

// decodeWindow is the inverse of append; empty input is a new window. Anything that append does not
// make is ErrCorrupt.
func decodeWindow(b []byte) (*window, error) {
	if len(b) == 0 {
		return newWindow(), nil
	}
	if len(b) < windowHeaderBytes || b[0] != windowVersion {
		return nil, fmt.Errorf("session window of %d bytes, version %d: this build reads version %d: %w",
			len(b), b[0], windowVersion, trivet.ErrCorrupt)
	}
	w, rest, err := decodeWindowBody(b[1:])
	if err == nil && len(rest) != 0 {
		err = fmt.Errorf("session window of %d bytes is followed by %d: %w", len(b), len(rest), trivet.ErrCorrupt)
	}
	return w, err
}

// decodeWindowBody is the inverse of appendBody; it returns what follows the window as well.
// REQUIRES: len(b) >= windowFixedBytes.
func decodeWindowBody(b []byte) (w *window, rest []byte, err error) {
	w = newWindow()
	w.mark = binary.BigEndian.Uint64(b)
	n := uint64(binary.BigEndian.Uint16(b[8:]))
	size := windowFixedBytes + (n+3)/4
	if w.mark == 0 || w.mark > w.mark+n || n > windowN || uint64(len(b)) < size {
		return nil, nil, fmt.Errorf("session window of %d bytes says %d states above mark %d: %w",
			len(b), n, w.mark, trivet.ErrCorrupt)
	}
	w.high = w.mark + n
	for i := range (n + 3) / 4 * 4 {
		last := seqState(b[windowFixedBytes+i/4] >> (2 * (i % 4)) & 3)
		if last > seqRefused || (i >= n && last != seqUnseen) {
			return nil, nil, fmt.Errorf("session window has state %d for sequence %d: %w", last, w.mark+i,
				trivet.ErrCorrupt)
		}
		if i < n {
			w.state[(w.mark+i)%windowN] = last
		}
	}
	if n > 0 && w.state[(w.high-1)%windowN] == seqUnseen {
		return nil, nil, fmt.Errorf("session window ends with unseen sequence %d: %w", w.high-1, trivet.ErrCorrupt)
	}
	return w, b[size:], nil
}
