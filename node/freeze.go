package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

const (
	// holdMax bounds how long writes wait for a snapshot. When the group does not answer within that, they go on, and
	// it is tried again.
	holdMax = 10 * time.Second
	// freezeRetryMin is the pause after a failed attempt; it doubles up to freezeRetryMax.
	freezeRetryMin = 100 * time.Millisecond
	freezeRetryMax = 5 * time.Second
)

// freezeHeld makes the snapshots that are wanted of volumes which this node has attached for writing, until ctx ends.
// One that others write, or nobody, is for the leader's agent (leaderFreezes).
func (m *mounts) freezeHeld(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	var mu sync.Mutex
	busy := map[trivet.VolumeID]bool{} // its snapshots are made one after the other
	freed := make(chan struct{}, 1)
	for {
		changed := m.attacher.cat.Changed()
		st := m.attacher.cat.Local()
		for _, s := range st.CreatingSnapshots() {
			mu.Lock()
			mine := !busy[s.Volume] && m.freezes(st, &s) != nil
			if mine {
				busy[s.Volume] = true
			}
			mu.Unlock()
			if !mine {
				continue
			}
			running.Go(func() {
				m.freezeUntilDone(ctx, s.ID)
				mu.Lock()
				delete(busy, s.Volume)
				mu.Unlock()
				select {
				case freed <- struct{}{}:
				default:
				}
			})
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-freed:
		}
	}
}

// freezes returns the volume of s if its snapshots are for this node to make, as it sees the volume; else nil.
func (m *mounts) freezes(st *meta.State, s *meta.Snapshot) *meta.Volume {
	v, ok := st.Volume(s.Volume)
	if !ok || s.State != meta.SnapshotCreating || s.Group != 0 { // groups: snapgroup.go
		return nil
	}
	held := v.GrantOf(m.attacher.node)
	if held == nil || held.ReadOnly || !v.Usable(m.attacher.node, held.Epoch) {
		return nil
	}
	v = v.As(m.attacher.node)
	return &v
}

func (m *mounts) freezeUntilDone(ctx context.Context, id trivet.SnapshotID) {
	for retry := freezeRetryMin; ; retry = min(2*retry, freezeRetryMax) {
		done, err := m.freezeOnce(ctx, id)
		if done || ctx.Err() != nil {
			return
		}
		m.log.Warn("a snapshot is not made yet", "snapshot", id, "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(retry):
		}
	}
}

// freezeOnce makes a snapshot and reports it. done: it is made, or not for this node to make.
func (m *mounts) freezeOnce(ctx context.Context, id trivet.SnapshotID) (done bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout+holdMax)
	defer cancel()
	st, err := m.attacher.cat.Read(ctx)
	if err != nil {
		return false, err
	}
	s, _ := st.Snapshot(id)
	v := m.freezes(st, &s)
	if v == nil {
		return true, nil
	}
	f, held, err := m.freeze(ctx, v, id)
	r := &meta.ReportSnapshot{
		Snapshot: id, State: meta.SnapshotReady, Generation: f.Generation, SizeBytes: f.SizeBytes, Held: held,
	}
	switch {
	case errors.Is(err, trivet.ErrNoSpace):
		r = &meta.ReportSnapshot{Snapshot: id, State: meta.SnapshotFailed, Reason: err.Error()}
	case err != nil:
		return false, err
	default:
		if held > 0 {
			m.holdTimes.Single.Observe(held)
		}
		m.log.Info("snapshot made", "volume", v.ID, "snapshot", id, "generation", f.Generation, "held", held)
	}
	err = reportSnapshot(ctx, m.attacher.cat, r)
	return err == nil, err
}

// freeze makes a snapshot in the volume's group, with all in it that was acknowledged here, and returns how long writes
// were held for it. The cache is drained while writes go on, and the rest with writes held. The limits of the volume do
// not matter: they are above the cache.
func (m *mounts) freeze(ctx context.Context, v *meta.Volume, id trivet.SnapshotID) (
	f replication.Frozen, held time.Duration, err error,
) {
	at := m.attacher.get(v.ID)
	if at == nil || at.path == nil {
		f, err = m.freezeUnopened(ctx, v, id)
		return f, 0, err
	}
	if at.epoch != v.Attached.Epoch {
		return f, 0, fmt.Errorf("freeze %s: this process has epoch %d, the volume %d: %w", v.ID, at.epoch, v.Attached.Epoch,
			trivet.ErrPending)
	}
	if err := at.path.drain(ctx); err != nil {
		return f, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, holdMax)
	defer cancel()
	release, err := at.path.cache.Hold(ctx)
	if err != nil {
		return f, 0, err
	}
	defer release()
	f, err = at.group.Freeze(ctx, id)
	return f, release(), err
}

// freezeUnopened makes a snapshot of a volume that is attached here and that nothing uses: all there is, the group has,
// unless an earlier process has left dirty blocks.
func (m *mounts) freezeUnopened(ctx context.Context, v *meta.Volume, id trivet.SnapshotID) (
	f replication.Frozen, err error,
) {
	unlock, err := m.lockUnopened(v.ID)
	if err != nil {
		return f, err
	}
	defer unlock()
	return m.freezeByGroup(ctx, v, id)
}

// lockUnopened has nobody open a volume that nothing uses until unlock is called.
func (m *mounts) lockUnopened(id trivet.VolumeID) (unlock func(), err error) {
	if unlock, err = m.ops.try(id); err != nil {
		return nil, err
	}
	if err := m.mayFreezeUnopened(id); err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// mayFreezeUnopened returns ErrPending unless the group has all of a volume that nothing uses.
func (m *mounts) mayFreezeUnopened(id trivet.VolumeID) error {
	a := m.attacher
	if a.get(id) != nil {
		return fmt.Errorf("freeze %s: it is being opened: %w", id, trivet.ErrPending)
	}
	if a.caches.dir != "" {
		if _, err := os.Lstat(a.caches.path(id)); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("freeze %s: writes that the last process acknowledged are not written back yet: %w", id,
				trivet.ErrPending)
		}
	}
	return nil
}

// freezeByGroup makes a snapshot by a group that is opened for it.
func (m *mounts) freezeByGroup(ctx context.Context, v *meta.Volume, id trivet.SnapshotID) (
	f replication.Frozen, err error,
) {
	a := m.attacher
	// A freeze has no sequence in the session of the epoch (H39), so that others may write at it later.
	group, err := a.openGroup(replication.VolumeConfig{
		ID: v.ID, SizeBytes: v.SizeBytes, Epoch: v.Attached.Epoch, IOTimeout: holdMax, Members: mayLead(v),
		FindMembers: func() []raftgroup.Member {
			now, _ := a.cat.Local().Volume(v.ID)
			return mayLead(&now)
		},
		Network: a.network, Host: a.host, Logger: a.log.With("volume", v.ID),
	})
	if err != nil {
		return f, err
	}
	f, err = group.Freeze(ctx, id)
	return f, errors.Join(err, group.Close())
}
