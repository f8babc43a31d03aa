package node

import (
	"errors"
	"sync"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/engine"
)

// damages is what the engine of a disk has said of it since it was opened: which volumes a rotten block or table may
// have cost something. A single block that is damaged is not among it: replication repairs it with the data of another
// replica, and only says so when none has them, or too many had to be repaired (replication/repair.go). Damage of
// the map, which is in tables, is: nobody can say which blocks it costs.
// Of a volume that is touched the replica becomes Faulted, and is replaced elsewhere. It runs on
// meanwhile, for most of it is good, and a bad block is never served; but it passes leadership on, so that reads find
// another one. A disk with damage gets no new replicas: what is made there may meet it again. Its operator empties and
// formats it, or replaces it.
type damages struct {
	mu     sync.Mutex
	met    []*engine.DamageError
	notify func() // tells the agent; nil before there is one
}

// add is engine.Config.OnCorruption: it must not block, nor call the engine.
func (d *damages) add(err error) {
	var e *engine.DamageError
	if !errors.As(err, &e) {
		return // the engine promises one
	}
	d.mu.Lock()
	d.met = append(d.met, e)
	notify := d.notify
	d.mu.Unlock()
	if notify != nil {
		notify()
	}
}

// watch has f called after each add. f must not block.
func (d *damages) watch(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.notify = f
}

// since returns what was added after the first n.
func (d *damages) since(n int) []*engine.DamageError {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]*engine.DamageError(nil), d.met[n:]...)
}

// damageReason begins the reason of a replica that is Faulted for damage on its disk.
const damageReason = meta.ReasonDiskDamaged

// noteDamage looks at what the disks have met since it was called last, and wakes the workers of the replicas that
// are touched. A replica that is made there later is another one, and is not. It waits until the local copy of the
// catalogue shows this process as registered: all that was placed here before is in it then.
func (a *Agent) noteDamage() {
	st := a.cat.Local()
	if self, ok := st.Node(a.cfg.ID); !ok || self.Incarnation != a.cfg.Self.Incarnation {
		return
	}
	for id, d := range a.cfg.Damages {
		a.mu.Lock()
		news := d.since(a.damageSeen[id])
		a.damageSeen[id] += len(news)
		a.mu.Unlock()
		if len(news) == 0 {
			continue
		}
		for _, v := range st.Volumes() {
			for _, r := range v.Replicas {
				if r.Node == a.cfg.ID && r.Disk == id && r.State != meta.ReplicaRemoved {
					a.touch(v.ID, r.ID, news)
				}
			}
		}
	}
}

// touch notes that a replica is touched, if it is.
func (a *Agent) touch(v trivet.VolumeID, r trivet.ReplicaID, news []*engine.DamageError) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range news {
		if !e.Touches(v) || a.damaged[r] != "" {
			continue
		}
		a.damaged[r] = damageReason + e.Error()
		a.log.Error("replica is out of service: its disk is damaged", "volume", v, "replica", r, "err", e)
		if w := a.workers[v]; w != nil {
			w.poke()
		}
	}
}

// damageOf returns why a replica is out of service for damage on its disk, "" when it is not.
func (a *Agent) damageOf(v *meta.Volume) map[trivet.ReplicaID]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out map[trivet.ReplicaID]string
	for i := range v.Replicas {
		if why := a.damaged[v.Replicas[i].ID]; why != "" {
			if out == nil {
				out = make(map[trivet.ReplicaID]string)
			}
			out[v.Replicas[i].ID] = why
		}
	}
	return out
}
