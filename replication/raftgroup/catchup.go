package raftgroup

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// The follower's side of a catch-up outside Raft.
//
// A follower whose missing entries are gone from the leader's log is told so by KindFetch, for as long as
// the leader's library believes that it sends a snapshot. It answers at once. Meanwhile its own library is
// stopped: the replica votes for nobody, acknowledges nothing, leads never and serves nothing. It pulls an
// image of what it lacks (pull.go) straight into the state machine, takes over the snapshot that the image
// stands for (install.go), starts the library, and only then says that it is done.
//
// What is not done when the source dies, or this process, goes on from where the state machine says that
// it got: from the leader that makes contact, in the replica's own term or a higher one, or, where nobody
// leads, from any other member: two of three replicas may be catching up, and elect nobody. Any member's
// image will do that is not behind this replica, because what a state machine has applied is committed.

const (
	roundsMax    = 3               // that may fail before a replica that is whole gives up and starts again
	roundWaitMax = 5 * time.Second // between two that failed
	leaderSilent = 3               // heartbeats without a leader until the other members are asked
)

// CatchUp is how far a replica is that pulls what it missed, and does not run meanwhile.
type CatchUp struct {
	Active bool
	// From and FromNode say whose state it pulls; empty while it looks for somebody.
	From     trivet.ReplicaID
	FromNode trivet.NodeID
	// DoneBytes of EstimatedBytes have arrived in this transfer; one that goes on after an interruption
	// counts what was left.
	DoneBytes, EstimatedBytes int64
}

// catchUp is what a replica knows of its own catch-up.
type catchUp struct {
	wake chan struct{} // a leader has made contact

	mu        sync.Mutex
	active    bool // the library does not run, and only catchUpLoop may start it
	term      uint64
	leader    raft.ServerAddress // that made contact last, in term
	heard     time.Time
	notBefore time.Time // a catch-up that came to nothing is not begun again
	from      raft.ServerAddress
	done      int64
	estimate  int64
}

func newCatchUp() *catchUp { return &catchUp{wake: make(chan struct{}, 1)} }

func (c *catchUp) isActive() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.active
}

// contact notes that a leader of that term was heard of.
func (c *catchUp) contact(leader raft.ServerAddress, term uint64) {
	c.mu.Lock()
	if term >= c.term {
		c.term, c.leader, c.heard = term, leader, time.Now()
	}
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// pulling notes where the state comes from; "" = nowhere.
func (c *catchUp) pulling(from raft.ServerAddress, estimate int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.from, c.done, c.estimate = from, 0, estimate
}

func (c *catchUp) got(done int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done = done
}

func (c *catchUp) status() CatchUp {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := CatchUp{Active: c.active}
	if id, node, err := parseAddress(c.from); err == nil && c.active {
		s.From, s.FromNode, s.DoneBytes, s.EstimatedBytes = id, node, c.done, c.estimate
	}
	return s
}

// onFetch answers a leader that says that this replica must pull its state.
func (g *Group) onFetch(leader raft.ServerAddress, body []byte) ([]byte, error) {
	ask, err := decodeFetchAsk(body)
	if err != nil {
		return nil, err
	}
	term := g.term()
	if ask.term < term {
		return fetchReply{term: term}.encode(), nil
	}
	g.catch.contact(leader, ask.term)
	if g.catch.isActive() {
		return fetchReply{term: ask.term}.encode(), nil
	}
	if at, ok := g.has(ask.rec); ok && g.running() != nil {
		if at.index > g.store.durable.index() { // gate 1 (durable.go): not yet; the leader asks again
			return fetchReply{term: ask.term}.encode(), nil
		}
		return fetchReply{term: ask.term, done: true, at: at}.encode(), nil
	}
	g.beginCatchUp()
	return fetchReply{term: ask.term}.encode(), nil
}

// term returns the newest term that this replica knows of.
func (g *Group) term() uint64 {
	g.catch.mu.Lock()
	defer g.catch.mu.Unlock()
	if !g.catch.active { // else the library would have stored it
		return g.stable.record().term
	}
	return max(g.stable.record().term, g.catch.term)
}

// beginCatchUp starts the loop if it does not run.
func (g *Group) beginCatchUp() {
	g.mu.Lock() // Close sets closed under it, before it waits for the loops
	defer g.mu.Unlock()
	g.catch.mu.Lock()
	defer g.catch.mu.Unlock()
	if g.closed || g.catch.active || time.Now().Before(g.catch.notBefore) {
		return
	}
	g.catch.active = true
	g.loops.Go(g.catchUpLoop)
}

// noteLeader is told of an AppendEntries that arrives while the library does not run.
func (g *Group) noteLeader(sender raft.ServerAddress, body []byte) error {
	req, err := decodeAppend(body)
	if err != nil {
		return err
	}
	if term := g.term(); req.Term < term {
		return fmt.Errorf("append of term %d, this replica knows of %d: %w", req.Term, term, trivet.ErrUnavailable)
	}
	g.catch.contact(sender, req.Term)
	return fmt.Errorf("replica is catching up: %w", trivet.ErrUnavailable)
}

// catchUpLoop pulls until this replica is whole and runs again.
func (g *Group) catchUpLoop() {
	if !g.suspend() {
		return
	}
	began := time.Now()
	idle := 0 // rounds in a row that brought nothing
	refused := false
	for failed := 0; ; failed++ {
		from, leads, ok := g.nextSource(began, failed)
		if !ok {
			return
		}
		want := g.cfg.Machine.Want()
		if refused && !leads {
			want = nil // a whole image may be older than what a begun Restore has taken
		}
		got, err := g.round(from, want)
		if err == nil {
			break
		}
		refused = refused || errors.Is(err, errRefused)
		if g.life.Err() != nil || g.guard.failed() != nil {
			return
		}
		g.log.Warn("catch-up interrupted", "from", string(from), "bytes", got, "err", err)
		if idle++; got > 0 {
			idle = 0
		}
		if idle >= roundsMax && !g.cfg.Machine.Restoring() {
			g.giveUp()
			break
		}
		if !g.rest(min(g.cfg.Timing.Heartbeat/4<<min(idle, 8), roundWaitMax)) {
			return
		}
	}
	g.resume()
}

// giveUp lets the library run on what is there, which is whole; the leader will ask again.
func (g *Group) giveUp() {
	g.catch.mu.Lock()
	defer g.catch.mu.Unlock()
	g.catch.notBefore = time.Now().Add(roundWaitMax)
}

// rest waits, and reports whether the group is still open.
func (g *Group) rest(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-g.life.Done():
		return false
	}
}

// suspend stops the library for a catch-up; false when the group closes.
func (g *Group) suspend() bool {
	g.runTurn <- struct{}{}
	defer func() { <-g.runTurn }()
	if g.isClosed() {
		return false
	}
	g.stopLocked()
	return true
}

// resume starts the library again. A failure is fatal: the group has no instance any more.
func (g *Group) resume() {
	g.runTurn <- struct{}{}
	defer func() { <-g.runTurn }()
	if g.isClosed() {
		return
	}
	err := g.checkState()
	if holes := g.holes.all(); err == nil && len(holes) > 0 {
		err = fmt.Errorf("entry %d is damaged: %w", holes[0], trivet.ErrCorrupt) // a broken invariant
	}
	if err == nil {
		err = g.startLocked()
	}
	if err != nil {
		g.guard.fail(fmt.Errorf("start group %s after a catch-up: %w", g.cfg.Group, err))
		return
	}
	g.catch.pulling("", 0)
	g.catch.mu.Lock()
	g.catch.active = false
	g.catch.mu.Unlock()
	g.poke()
}

// nextSource waits for somebody to pull from: the leader first, and after a failure, or where nobody has
// led for a while, the other members in turn. leads says that there is a leader; ok is false when the group
// closes.
func (g *Group) nextSource(began time.Time, failed int) (from raft.ServerAddress, leads, ok bool) {
	for {
		g.catch.mu.Lock()
		leader, heard := g.catch.leader, g.catch.heard
		g.catch.mu.Unlock()
		patience := leaderSilent * g.cfg.Timing.Heartbeat
		fresh := leader != "" && time.Since(heard) < patience
		if heard.Before(began) {
			heard = began
		}
		missing := time.Until(heard.Add(patience))
		if fresh || missing <= 0 {
			if list := g.sources(leader, fresh); len(list) > 0 {
				return list[failed%len(list)], fresh, true
			}
			missing = g.cfg.Timing.Heartbeat
		}
		timer := time.NewTimer(missing)
		select {
		case <-timer.C:
		case <-g.catch.wake:
		case <-g.life.Done():
			timer.Stop()
			return "", false, false
		}
		timer.Stop()
	}
}

// sources lists the leader, if it is one, and the other members.
func (g *Group) sources(leader raft.ServerAddress, fresh bool) []raft.ServerAddress {
	var list []raft.ServerAddress
	if fresh {
		list = append(list, leader)
	}
	for _, m := range g.store.latestConfig().members {
		if a := address(m.Replica, m.Node); m.Replica != g.cfg.Replica && !slices.Contains(list, a) {
			list = append(list, a)
		}
	}
	return list
}

// round pulls one image and takes it over. got is how much arrived. REQUIRES: the library is stopped.
func (g *Group) round(from raft.ServerAddress, want []byte) (got int64, err error) {
	p, err := g.openPull(g.life, from, want)
	if err != nil {
		return 0, err
	}
	restored := false
	defer func() { p.close(restored) }()
	g.catch.pulling(from, p.opened.sizeBytes)
	rec := p.opened.rec
	err = g.notBehind(rec)
	if err == nil {
		err = g.coversHoles(rec)
	}
	if err != nil {
		return 0, fmt.Errorf("image of %s: %w", from, err)
	}
	g.log.Info("state is pulled", "from", string(from), "index", rec.index, "term", rec.term, "bytes", p.opened.sizeBytes)
	r := installRecord{term: max(g.term(), rec.term), rec: rec}
	if err := g.beginInstall(r); err != nil {
		return 0, err
	}
	if err := g.restore(p, rec); err != nil {
		return p.gotBytes.Load(), err
	}
	restored = true
	if err := g.finishInstall(r); err != nil {
		err = fmt.Errorf("take over the state at index %d: %w", rec.index, err)
		g.guard.fail(err)
		return p.gotBytes.Load(), err
	}
	return p.gotBytes.Load(), nil
}

// notBehind returns ErrInvalid for an image that is older than this replica: neither state nor snapshot go
// back (I7), and the log goes on from the snapshot, no-ops included.
func (g *Group) notBehind(rec snapshotRecord) error {
	applied, _ := g.cfg.Machine.Applied()
	if own := g.snaps.record(); rec.index < own.index || rec.machine < applied {
		return fmt.Errorf("it is at %d (machine %d), this replica is at %d (machine %d): %w",
			rec.index, rec.machine, own.index, applied, trivet.ErrInvalid)
	}
	return nil
}

// restore does step 2 (install.go). What went wrong decides what is next: a source that failed, or an
// image that does not fit, leaves this replica waiting for another; all else is fatal.
func (g *Group) restore(p *pull, rec snapshotRecord) error {
	if g.restored(rec) {
		return nil // its log alone is short, or a crash came after the restore
	}
	g.fsm.setMixed(true)
	err := g.cfg.Machine.Restore(p)
	g.fsm.setMixed(g.cfg.Machine.Restoring())
	if err == nil && !g.restored(rec) {
		index, _ := g.cfg.Machine.Applied()
		err = fmt.Errorf("restored state is at index %d, want %d: %w", index, rec.machine, trivet.ErrCorrupt)
		g.guard.fail(err)
	}
	if err == nil {
		return nil
	}
	switch {
	case p.failed() != nil:
		err = fmt.Errorf("%w: %v", p.failed(), err)
	case errors.Is(err, trivet.ErrInvalid):
		err = fmt.Errorf("%w: %w", errRefused, err)
	case !mayRetryRestore(err):
		g.guard.fail(fmt.Errorf("restore the state at index %d: %w", rec.index, err))
		return err
	}
	if g.cfg.Machine.Restoring() {
		return err
	}
	return errors.Join(err, g.endInstall()) // nothing has changed
}

// errRefused: the state machine does not take the image.
var errRefused = errors.New("image is refused")

// mayRetryRestore tells an image that is damaged, and a disk that is full, from a disk that fails.
func mayRetryRestore(err error) bool {
	return errors.Is(err, trivet.ErrCorrupt) || errors.Is(err, trivet.ErrNoSpace) ||
		errors.Is(err, trivet.ErrInUse) || errors.Is(err, trivet.ErrClosed)
}

// receiveStopped answers a message while the library does not run.
func (g *Group) receiveStopped(sender raft.ServerAddress, m transport.Message) ([]byte, error) {
	if m.Kind == transport.KindAppendEntries && g.catch.isActive() {
		return nil, g.noteLeader(sender, m.Body)
	}
	return nil, fmt.Errorf("group is between two runs: %w", trivet.ErrUnavailable)
}
