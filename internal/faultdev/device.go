package faultdev

import (
	"context"
	"fmt"
	"sync"

	"github.com/trivet-csi/trivet"
)

// Kind is the kind of a request.
type Kind uint8

// The kinds of requests. Size is not one: it never fails.
const (
	Read Kind = iota + 1
	Write
	Discard
	WriteZeroes
	Flush
)

// String returns the name of the kind in lower case.
func (k Kind) String() string {
	switch k {
	case Read:
		return "read"
	case Write:
		return "write"
	case Discard:
		return "discard"
	case WriteZeroes:
		return "write-zeroes"
	case Flush:
		return "flush"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Op is one request as it arrived.
type Op struct {
	Seq      int // position among all requests of the Device, from 1
	Kind     Kind
	OffBytes int64
	LenBytes int64
}

// OfKind returns a predicate that matches requests of the given kinds.
func OfKind(kinds ...Kind) func(Op) bool {
	return func(op Op) bool {
		for _, k := range kinds {
			if op.Kind == k {
				return true
			}
		}
		return false
	}
}

// Touches returns a predicate that matches requests, other than flushes, that overlap
// [offBytes, offBytes+lenBytes).
func Touches(offBytes, lenBytes int64) func(Op) bool {
	return func(op Op) bool {
		return op.Kind != Flush && op.OffBytes < offBytes+lenBytes && offBytes < op.OffBytes+op.LenBytes
	}
}

// Fault tells which requests fail, and how.
type Fault struct {
	// Match selects requests; nil selects all.
	Match func(Op) bool

	// Skip is how many selected requests pass before the first one fails.
	Skip int

	// Times is how many requests fail; 0 means all that follow.
	Times int

	// Err is what a failed request returns. REQUIRES: non-nil.
	Err error

	// After lets the request take effect below before it fails, as a lost reply does. Without it
	// a failed request has no effect.
	After bool
}

// faultState is a Fault and how much of it is used up. Guarded by Device.mu.
type faultState struct {
	Fault
	seenN   int
	failedN int
}

var _ trivet.Device = (*Device)(nil)

// Device passes requests on to another Device, records them, and fails or holds those it was
// told to. It is safe for concurrent use; faults and gates may be set while requests run.
type Device struct {
	next trivet.Device

	mu     sync.Mutex
	seqN   int
	ops    []Op
	faults []*faultState
	gates  []*Gate
}

// Wrap returns a Device over next that as yet only records.
func Wrap(next trivet.Device) *Device {
	return &Device{next: next}
}

// Inject adds a fault. Faults are tried in the order they were added; the first that strikes
// decides. It panics if f.Err is nil.
func (d *Device) Inject(f Fault) {
	if f.Err == nil {
		panic("faultdev: a fault needs an error")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults = append(d.faults, &faultState{Fault: f})
}

// FailNth makes the nth request of kind k from now on fail with err, once. n counts from 1.
func (d *Device) FailNth(k Kind, n int, err error) {
	d.Inject(Fault{Match: OfKind(k), Skip: n - 1, Times: 1, Err: err})
}

// Heal removes all faults and opens all gates. Counters and records stay.
func (d *Device) Heal() {
	d.mu.Lock()
	gates := d.gates
	d.gates, d.faults = nil, nil
	d.mu.Unlock()
	for _, g := range gates {
		g.Open()
	}
}

// Hold makes requests that match (nil: all) wait at the returned Gate until it opens. Requests
// that are already running are not held.
func (d *Device) Hold(match func(Op) bool) *Gate {
	g := &Gate{match: match, arrived: make(chan Op), step: make(chan struct{}), open: make(chan struct{})}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.gates = append(d.gates, g)
	return g
}

// Ops returns a copy of all requests so far, in the order of their arrival.
func (d *Device) Ops() []Op {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]Op(nil), d.ops...)
}

// Count returns how many requests of kind k have arrived since the last Forget.
func (d *Device) Count(k Kind) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, op := range d.ops {
		if op.Kind == k {
			n++
		}
	}
	return n
}

// Forget drops the record of requests. Sequence numbers go on.
func (d *Device) Forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ops = nil
}

// ReadAt implements trivet.Device.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.do(ctx, Op{Kind: Read, OffBytes: off, LenBytes: int64(len(p))}, func() error {
		return d.next.ReadAt(ctx, p, off)
	})
}

// WriteAt implements trivet.Device.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64) error {
	return d.do(ctx, Op{Kind: Write, OffBytes: off, LenBytes: int64(len(p))}, func() error {
		return d.next.WriteAt(ctx, p, off)
	})
}

// Discard implements trivet.Device.
func (d *Device) Discard(ctx context.Context, off, n int64) error {
	return d.do(ctx, Op{Kind: Discard, OffBytes: off, LenBytes: n}, func() error {
		return d.next.Discard(ctx, off, n)
	})
}

// WriteZeroes implements trivet.Device.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64) error {
	return d.do(ctx, Op{Kind: WriteZeroes, OffBytes: off, LenBytes: n}, func() error {
		return d.next.WriteZeroes(ctx, off, n)
	})
}

// Flush implements trivet.Device.
func (d *Device) Flush(ctx context.Context) error {
	return d.do(ctx, Op{Kind: Flush}, func() error { return d.next.Flush(ctx) })
}

// Size implements trivet.Device.
func (d *Device) Size() int64 { return d.next.Size() }

// do records op, waits at the gates, and lets op through unless a fault strikes. Which fault
// strikes is settled on arrival, so "the nth" does not depend on gates.
func (d *Device) do(ctx context.Context, op Op, run func() error) error {
	d.mu.Lock()
	d.seqN++
	op.Seq = d.seqN
	d.ops = append(d.ops, op)
	fault := d.strikeLocked(op)
	gates := append([]*Gate(nil), d.gates...)
	d.mu.Unlock()

	for _, g := range gates {
		if err := g.wait(ctx, op); err != nil {
			return fmt.Errorf("faulty %s: %w", op.Kind, err)
		}
	}
	if fault == nil {
		return run()
	}
	if fault.After {
		if err := run(); err != nil {
			return err
		}
	}
	return fmt.Errorf("faulty %s %d: %w", op.Kind, op.Seq, fault.Err)
}

func (d *Device) strikeLocked(op Op) *Fault {
	for _, f := range d.faults {
		if f.Match != nil && !f.Match(op) {
			continue
		}
		f.seenN++
		if f.seenN <= f.Skip || (f.Times > 0 && f.failedN >= f.Times) {
			continue
		}
		f.failedN++
		return &f.Fault
	}
	return nil
}

// Gate holds requests back; see Device.Hold.
type Gate struct {
	match   func(Op) bool
	arrived chan Op
	step    chan struct{}
	once    sync.Once
	open    chan struct{}
}

// Arrived delivers each request that has come to the gate. A request that nobody receives from
// here waits all the same.
func (g *Gate) Arrived() <-chan Op { return g.arrived }

// Step lets one request through and returns once it has passed; it blocks until there is one
// whose arrival was received.
func (g *Gate) Step() {
	select {
	case g.step <- struct{}{}:
	case <-g.open:
	}
}

// Open lets every request through, now and later. It may be called more than once.
func (g *Gate) Open() { g.once.Do(func() { close(g.open) }) }

func (g *Gate) wait(ctx context.Context, op Op) error {
	if g.match != nil && !g.match(op) {
		return nil
	}
	select {
	case <-g.open:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case g.arrived <- op:
	}
	select {
	case <-g.open:
		return nil
	case <-g.step:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
