package node

import (
	"context"

	"github.com/trivet-csi/trivet/controller/meta"
)

// recover makes the replica the only voter of its group, whose majority an operator has given up (H34). It decides by
// a linearizable read: on the strength of a copy that lags it would take a group apart that has its members again.
func (w *worker) recover(ctx context.Context, a action) error {
	v, err := w.read(ctx, a)
	if err != nil {
		return err
	}
	if r := v.Replica(a.id); v.Recover != a.id || r == nil || r.Node != w.agent.cfg.ID || r.Disk != a.disk {
		return nil // the local copy lagged
	}
	w.log.Error("recovering a volume from this replica: its others were given up", "replica", a.id, "epoch", v.Epoch)
	if err := w.agent.host.RecoverReplica(ctx, w.spec(a)); err != nil {
		return err
	}
	_, err = propose(ctx, w.agent.cat, meta.Command{ReportRecovered: &meta.ReportRecovered{
		Volume: w.volume, Replica: a.id,
	}})
	return err
}
