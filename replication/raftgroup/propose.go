package raftgroup

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// future is what the library answers a call with.
type future interface{ Error() error }

// answer is a future that has come true.
type answer struct {
	fut future
	err error
}

// enter counts a call into the library; false when it stops.
func (i *instance) enter() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return false
	}
	i.calls++
	return true
}

func (i *instance) leave() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.calls--; i.calls == 0 && i.idle != nil {
		close(i.idle)
		i.idle = nil
	}
}

// drain refuses new calls and waits for those under way, but no longer than limit.
func (i *instance) drain(limit time.Duration) {
	i.mu.Lock()
	i.closed = true
	var idle chan struct{}
	if i.calls > 0 {
		idle = make(chan struct{})
		i.idle = idle
	}
	i.mu.Unlock()
	if idle == nil {
		return
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-idle:
	case <-timer.C:
	}
}

// ask makes one call into the library and waits for its answer, for ctx, or for the end of this
// replica's leadership, whichever comes first. Only the first of these tells the outcome.
func (i *instance) ask(ctx context.Context, call func() future) (future, error) {
	if !i.enter() {
		return nil, raft.ErrNotLeader
	}
	lost := i.g.leadership()
	done := make(chan answer, 1)
	go func() { // joined by drain
		defer i.leave()
		f := call()
		done <- answer{f, f.Error()}
	}()
	select {
	case a := <-done:
		return a.fut, a.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-lost:
	}
	a, err := i.lastWord(ctx, done)
	if err != nil {
		return nil, err
	}
	return a.fut, a.err
}

// lastWord waits for the library's answer after the end of a leadership. It answers at once, unless its main goroutine
// hangs in the disk; and its answer may well be good, as when a leader has removed itself.
func (i *instance) lastWord(ctx context.Context, done <-chan answer) (answer, error) {
	grace := time.NewTimer(i.g.cfg.Timing.Heartbeat / 10)
	defer grace.Stop()
	select {
	case a := <-done:
		return a, nil
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	case <-grace.C:
		return answer{}, raft.ErrLeadershipLost
	}
}

// quickWait is how long a proposal waits for the library's main goroutine on the goroutine of its caller. When that is
// busy for longer, another one waits for it, so that ctx and the end of a leadership count.
const quickWait = 2 * time.Millisecond

// propose is ask for an entry of at least one byte. In the common case nobody waits for the library's answer: the
// state machine's goroutine hands the result to the caller (fsm.answer), without a goroutine in between.
func (i *instance) propose(ctx context.Context, data []byte) (any, error) {
	lost := i.g.leadership()
	if lost == nil { // only just elected: the library alone knows when that ends
		return i.proposeAsking(ctx, data)
	}
	if !i.enter() {
		return nil, raft.ErrNotLeader
	}
	applied := i.g.fsm.expect(data)
	f := i.r.Apply(data, quickWait)
	if refused(f) {
		i.g.fsm.forget(data)
		i.leave()
		if err := f.Error(); !errors.Is(err, raft.ErrEnqueueTimeout) {
			return nil, err
		}
		return i.proposeAsking(ctx, data) // the first one is definitely not applied
	}
	select {
	case result := <-applied:
		i.leave()
		return result, nil
	case <-ctx.Done():
	case <-lost:
	}
	return i.await(ctx, f, func() {
		i.g.fsm.forget(data)
		i.leave()
	})
}

// proposeAsking is propose by ask.
func (i *instance) proposeAsking(ctx context.Context, data []byte) (any, error) {
	f, err := i.ask(ctx, func() future { return i.r.Apply(data, i.g.enqueueWait()) })
	if err != nil {
		return nil, err
	}
	return f.(raft.ApplyFuture).Response(), nil
}

// refused reports whether what Apply returned has its error already: then it is no pointer (errorFuture, future.go:83).
// A test holds the library to that.
func refused(f raft.ApplyFuture) bool { return reflect.TypeOf(f).Kind() != reflect.Pointer }

// await waits for the answer to a proposal whose context or leadership has ended. finished is called once the library
// has answered.
func (i *instance) await(ctx context.Context, f raft.ApplyFuture, finished func()) (any, error) {
	done := make(chan answer, 1)
	go func() { // joined by drain
		defer finished()
		done <- answer{f, f.Error()}
	}()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	a, err := i.lastWord(ctx, done)
	if err == nil {
		err = a.err
	}
	if err != nil {
		return nil, err
	}
	return f.Response(), nil
}

// enqueueWait is how long a proposal may wait for the library's main goroutine.
func (g *Group) enqueueWait() time.Duration { return 4 * g.cfg.Timing.Heartbeat }

// Propose appends data and returns what Apply returned for it. It returns ErrNotLeader when the
// entry is definitely not applied, and never will be; ErrUnavailable when its fate is unknown, at
// once when leadership is lost; ErrInvalid when it is larger than EntryBytesMax, or than the log takes; ErrClosed after
// Close. A context error tells nothing about the outcome either. The group owns data from the call
// on.
func (g *Group) Propose(ctx context.Context, data []byte) (any, error) {
	if most := g.seglog.entryMax; len(data) > most {
		return nil, fmt.Errorf("propose %d bytes to %s, at most %d are allowed: %w",
			len(data), g.cfg.Group, most, trivet.ErrInvalid)
	}
	select {
	case g.slots <- struct{}{}:
		defer func() { <-g.slots }()
	case <-ctx.Done():
		return nil, fmt.Errorf("propose to %s: %w", g.cfg.Group, context.Cause(ctx))
	}
	if err := g.settled(ctx); err != nil {
		return nil, fmt.Errorf("propose to %s: %w", g.cfg.Group, err)
	}
	i, err := g.leading()
	if err != nil {
		return nil, fmt.Errorf("propose to %s: %w", g.cfg.Group, err)
	}
	do := i.propose
	if len(data) == 0 {
		do = i.proposeAsking
	}
	result, err := do(ctx, data)
	if err != nil {
		return nil, fmt.Errorf("propose to %s: %w", g.cfg.Group, outcome(err))
	}
	if err, ok := result.(error); ok && errors.Is(err, errDead) {
		return nil, fmt.Errorf("propose to %s: %w: %w", g.cfg.Group, err, trivet.ErrUnavailable)
	}
	return result, nil
}

// Barrier waits until every entry committed before the call is applied here. Errors are those of
// Propose; it may be repeated after any of them.
func (g *Group) Barrier(ctx context.Context) error {
	i, err := g.leading()
	if err == nil {
		_, err = i.ask(ctx, func() future { return i.r.Barrier(g.enqueueWait()) })
		err = outcome(err)
	}
	if err != nil {
		return fmt.Errorf("barrier of %s: %w", g.cfg.Group, err)
	}
	return nil
}

// leading returns the current run, ErrNotLeader when it does not lead.
func (g *Group) leading() (*instance, error) {
	g.mu.Lock()
	i, closed := g.inst, g.closed
	g.mu.Unlock()
	switch {
	case closed:
		return nil, trivet.ErrClosed
	case g.guard.failed() != nil:
		return nil, fmt.Errorf("replica failed: %w", trivet.ErrUnavailable)
	case i == nil || i.r.State() != raft.Leader:
		return nil, trivet.ErrNotLeader
	}
	return i, nil
}

// outcome is the one place where an error of the library becomes one of ours. What is not known to
// be definite is unknown: an entry whose StoreLogs failed may still be committed.
func outcome(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrEnqueueTimeout),
		errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return fmt.Errorf("%v: %w", err, trivet.ErrNotLeader)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	default:
		return fmt.Errorf("%w: %w", err, trivet.ErrUnavailable)
	}
}
