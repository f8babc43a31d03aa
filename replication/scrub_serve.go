package replication

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	// markerIdle is how long the view of a marker is kept without a sign of the leader: it keeps segments of the log.
	markerIdle = 2 * time.Minute
	// checkWait is how long the answer to a check is put off while it is not done.
	checkWait = time.Second
)

// markers keeps the view of the newest marker that this replica has applied (opScrub), for the leader to compare. There
// is one at a time: the next marker, a Restore or silence ends it.
type markers struct {
	vol *engine.Volume

	mu     sync.Mutex
	closed bool
	now    *marker
	passed chan struct{} // closed and renewed whenever now changes
	jobs   sync.WaitGroup
}

// marker is the view of one marker.
type marker struct {
	index uint64
	view  *engine.View
	idle  *time.Timer
	stop  context.CancelFunc // ends a check

	// Set by the one check, before done is closed.
	checking bool // under markers.mu
	done     chan struct{}
	out      scrubReply
	err      error
}

func newMarkers(vol *engine.Volume) *markers { return &markers{vol: vol, passed: make(chan struct{})} }

// take pins the view of a marker that was just applied. That there is none is not a failure of the state machine: the
// leader is told that this replica has missed it.
func (m *markers) take(index uint64, lba trivet.LBA, blockN int64) {
	if m == nil {
		return
	}
	view, err := m.vol.View(lba, blockN)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dropLocked()
	if err == nil && m.closed {
		_ = view.Close() // nobody will ask
		return
	}
	if err != nil {
		return
	}
	k := &marker{index: index, view: view, done: make(chan struct{})}
	k.idle = time.AfterFunc(markerIdle, func() { m.drop(k) })
	m.now = k
	close(m.passed)
	m.passed = make(chan struct{})
}

func (m *markers) drop(k *marker) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.now == k {
		m.dropLocked()
	}
}

func (m *markers) dropLocked() {
	k := m.now
	if k == nil {
		return
	}
	m.now = nil
	k.idle.Stop()
	if k.stop != nil {
		k.stop()
	}
	m.jobs.Go(func() {
		if k.checking {
			<-k.done
		}
		_ = k.view.Close() // only read
	})
}

func (m *markers) close() {
	m.mu.Lock()
	m.closed = true
	m.dropLocked()
	m.mu.Unlock()
	m.jobs.Wait()
}

// find returns the marker of an index, waiting for it while this replica has not applied that. ErrNotFound: it has, and
// has no view of it (any more).
func (m *markers) find(ctx context.Context, index uint64, applied func() uint64) (*marker, error) {
	for {
		m.mu.Lock()
		k, passed := m.now, m.passed
		if k != nil && k.index == index {
			k.idle.Reset(markerIdle)
			m.mu.Unlock()
			return k, nil
		}
		m.mu.Unlock()
		if k != nil && k.index > index || applied() >= index {
			return nil, fmt.Errorf("no view of the marker at index %d: %w", index, trivet.ErrNotFound)
		}
		poll := time.NewTimer(checkWait / 10) // it may be restored beyond the marker
		select {
		case <-passed:
		case <-poll.C:
		case <-ctx.Done():
			poll.Stop()
			return nil, fmt.Errorf("marker at index %d is not applied here yet: %w", index, trivet.ErrUnavailable)
		}
		poll.Stop()
	}
}

// handleScrub answers KindVolumeScrub. Only the nodes of members may ask: it gives blocks away.
func (h *Host) handleScrub(ctx context.Context, from trivet.NodeID, m transport.Message) (transport.Message, error) {
	req, err := decodeScrubRequest(m.Body)
	if err != nil {
		return transport.Message{}, err
	}
	r, ok := h.Replica(m.Group)
	if !ok {
		return transport.Message{}, fmt.Errorf("%s has no running replica on %s: %w", m.Group, h.cfg.Network.Local(),
			trivet.ErrUnavailable)
	}
	if !slices.ContainsFunc(r.group.Status().Members, func(x raftgroup.Member) bool { return x.Node == from }) {
		return transport.Message{}, fmt.Errorf("node %s has no replica of %s: %w", from, m.Group, trivet.ErrInvalid)
	}
	out, err := r.serveScrub(ctx, &req)
	if err != nil {
		return transport.Message{}, err
	}
	return transport.Message{Body: out.append(nil)}, nil
}

func (r *Replica) serveScrub(ctx context.Context, req *scrubRequest) (scrubReply, error) {
	switch req.op {
	case scrubProbe:
		return scrubReply{index: r.machine.view.Load().AppliedIndex}, nil
	case scrubFetch:
		return r.serveFetch(req)
	case scrubReadAt:
		return r.serveReadAt(req)
	case scrubAccuse:
		r.log.Error("the state or the snapshots of this replica are not those of the others", "index", req.index)
		r.machine.vol.ReportDamage(fmt.Sprintf("state or snapshots at index %d are not those of the majority", req.index))
		return scrubReply{}, nil
	}
	k, err := r.markers.find(ctx, req.index, func() uint64 { return r.machine.view.Load().AppliedIndex })
	if err != nil {
		return scrubReply{}, err
	}
	switch req.op {
	case scrubCheck:
		return r.serveCheck(ctx, k, req)
	case scrubVersions:
		versions, next, err := k.view.Versions(req.lba, scrubItemsMax)
		out := scrubReply{next: next}
		for _, v := range versions {
			out.items = append(out.items, scrubItem{v, itemHas})
		}
		return out, err
	case scrubFix:
		return r.serveFix(ctx, k, req)
	default:
		r.markers.drop(k)
		return scrubReply{}, nil
	}
}

// serveFetch reads versions of blocks for another replica. It never repairs its own: two replicas with the same damaged
// block would ask each other for ever.
func (r *Replica) serveFetch(req *scrubRequest) (scrubReply, error) {
	if len(req.items) > fetchBlocksMax {
		return scrubReply{}, fmt.Errorf("fetch of %d blocks, at most %d: %w", len(req.items), fetchBlocksMax,
			trivet.ErrInvalid)
	}
	out := scrubReply{items: req.items, data: make([]byte, 0, len(req.items)*trivet.BlockSize)}
	p := make([]byte, trivet.BlockSize)
	for i := range out.items {
		err := r.machine.vol.ReadVersion(p, out.items[i].BlockVersion)
		switch {
		case err == nil:
			out.items[i].flag = itemHas
			out.data = append(out.data, p...)
		case errors.Is(err, trivet.ErrCorrupt):
			out.items[i].flag = itemDamaged
		case errors.Is(err, trivet.ErrNotFound):
			out.items[i].flag = itemNone
		default:
			return scrubReply{}, err
		}
	}
	return out, nil
}

// serveReadAt reads blocks for another replica, when this one has applied what is asked for.
func (r *Replica) serveReadAt(req *scrubRequest) (scrubReply, error) {
	if req.blockN == 0 || req.blockN > readBytesMax/trivet.BlockSize {
		return scrubReply{}, fmt.Errorf("read of %d blocks: %w", req.blockN, trivet.ErrInvalid)
	}
	if has := r.machine.view.Load().AppliedIndex; has < req.index {
		return scrubReply{}, fmt.Errorf("replica is at index %d, want %d: %w", has, req.index, trivet.ErrUnavailable)
	}
	p := make([]byte, req.blockN*trivet.BlockSize)
	if err := r.readBlocks(p, req.lba); err != nil {
		return scrubReply{}, err
	}
	if r.machine.restored.Load() { // the reply could not tell how new the blocks are
		return scrubReply{}, fmt.Errorf("replica is being restored: %w", trivet.ErrUnavailable)
	}
	sum := scrubItem{BlockVersion: engine.BlockVersion{LBA: req.lba, Sum: readSum(r.spec.Volume, req.lba, p)}}
	return scrubReply{index: r.machine.newest.Load(), items: []scrubItem{sum}, data: p}, nil
}

// serveCheck begins the check of a view, or looks how it is going. With repair, what is damaged here is repaired as
// soon as it is known.
func (r *Replica) serveCheck(ctx context.Context, k *marker, req *scrubRequest) (scrubReply, error) {
	m := r.markers
	m.mu.Lock()
	if !k.checking && m.now == k {
		k.checking = true
		life, stop := context.WithCancel(r.life)
		k.stop = stop
		m.jobs.Go(func() {
			defer stop()
			defer close(k.done)
			k.out, k.err = r.check(life, k, req)
		})
	}
	m.mu.Unlock()
	wait := time.NewTimer(checkWait)
	defer wait.Stop()
	select {
	case <-k.done:
		return k.out, k.err
	case <-wait.C:
		return scrubReply{more: true}, nil
	case <-ctx.Done():
		return scrubReply{}, fmt.Errorf("check at index %d: %w: %w", k.index, ctx.Err(), trivet.ErrUnavailable)
	}
}

func (r *Replica) check(ctx context.Context, k *marker, req *scrubRequest) (scrubReply, error) {
	found, err := k.view.Check(ctx, r.pace(req.rate))
	if err != nil {
		return scrubReply{}, err
	}
	out := scrubReply{
		index: k.index, blockN: found.BlockN, found: int64(len(found.Bad)), state: found.State, blocks: found.Blocks,
	}
	if req.blockN == scrubWithOlder {
		out.data = found.Older[:]
	}
	r.repair.checked.Add(found.BlockN * trivet.BlockSize)
	if len(found.Bad) == 0 {
		return out, nil
	}
	for i, b := range found.Bad {
		if i < findingsMax {
			out.items = append(out.items, scrubItem{b.BlockVersion, itemDamaged})
		}
	}
	if !req.repair {
		bad, err := r.machine.vol.StillBad(found.Bad)
		if err != nil {
			return scrubReply{}, err
		}
		out.found, out.left = int64(len(bad)), int64(len(bad))
		r.repair.found.Add(out.found)
		return out, nil
	}
	if err := r.repair.takeTurn(ctx); err != nil {
		return scrubReply{}, err
	}
	defer r.repair.endTurn()
	done, err := r.repair.fix(ctx, found.Bad)
	out.found, out.repaired, out.left = int64(done.found), int64(done.repaired), int64(done.lost+done.open)
	if err != nil {
		r.log.Error("a scrub could not repair what it found", "found", out.found, "repaired", out.repaired, "err", err)
		out.left = out.found - out.repaired
	}
	return out, nil
}

// pace returns what a check waits for before it reads: its own rate, and whatever the machine does besides.
func (r *Replica) pace(bytesPerSecond int64) func(context.Context, int64) error {
	var own *rate.Limiter
	if bytesPerSecond > 0 {
		own = rate.NewLimiter(rate.Limit(bytesPerSecond), int(max(bytesPerSecond, scrubBurstMin)))
	}
	return func(ctx context.Context, n int64) error {
		if own != nil {
			if err := own.WaitN(ctx, int(n)); err != nil {
				return err
			}
		}
		if r.scrubTurn != nil {
			return r.scrubTurn(ctx, n)
		}
		return nil
	}
}

// scrubBurstMin is what one wait for a rate may ask for: a piece of a view.
const scrubBurstMin = 1 << 20

// serveFix makes blocks of the view what the majority has.
func (r *Replica) serveFix(ctx context.Context, k *marker, req *scrubRequest) (scrubReply, error) {
	if err := r.repair.takeTurn(ctx); err != nil {
		return scrubReply{}, err
	}
	defer r.repair.endTurn()
	out := scrubReply{index: k.index, found: int64(len(req.items))}
	r.repair.found.Add(out.found)
	for items := req.items; len(items) > 0; {
		n := min(len(items), fetchBlocksMax)
		repaired, left, err := r.fixSome(ctx, k, items[:n])
		out.repaired, out.left, items = out.repaired+repaired, out.left+left, items[n:]
		if err != nil {
			return scrubReply{}, err
		}
	}
	// A map that was wrong must not come back with a crash.
	return out, r.spec.Disk.Engine.Flush()
}

func (r *Replica) fixSome(ctx context.Context, k *marker, items []scrubItem) (repaired, left int64, err error) {
	var wants []engine.BlockVersion
	for _, i := range items {
		if i.flag == itemHas {
			wants = append(wants, i.BlockVersion)
		}
	}
	data, _ := r.repair.fetch(ctx, wants)
	var repairs []engine.Repair
	var tried []trivet.LBA
	for _, i := range items {
		var block []byte
		if i.flag == itemHas {
			if block, data = data[0], data[1:]; block == nil {
				// It may have been written elsewhere, of which this replica is about to hear: ScrubRange looks again.
				if !k.view.IsWritten(i.LBA) {
					left++
				}
				continue
			}
		}
		x, err := k.view.Repair(i.BlockVersion, block)
		if err != nil {
			r.log.Error("a block that differs from the others' cannot be repaired", "lba", i.LBA, "err", err)
			left++
			continue
		}
		repairs, tried = append(repairs, x), append(tried, i.LBA)
	}
	n, err := r.machine.vol.Replace(repairs)
	r.repair.counted(n)
	if n < len(repairs) { // those that were written meanwhile are as good as repaired, and others are not
		written := len(slices.DeleteFunc(tried, func(lba trivet.LBA) bool { return !k.view.IsWritten(lba) }))
		left += int64(max(0, len(repairs)-n-written))
	}
	if n > 0 {
		r.log.Warn("made blocks what the other replicas have", "blocks", n, "lba", items[0].LBA)
	}
	return int64(n), left, err
}
