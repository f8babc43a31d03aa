package server

import (
	"context"
	"time"

	"github.com/trivet-csi/trivet/api"
)

// ListAudit implements api.AdminServer.
func (a *admin) ListAudit(ctx context.Context, r *api.ListAuditRequest) (*api.AuditLog, error) {
	state := a.s.catalogue.Local()
	if !r.GetLocal() {
		var err error
		if state, err = a.s.catalogue.Read(ctx); err != nil {
			return nil, err
		}
	}
	audit := state.Audit()
	out := &api.AuditLog{Base: audit.Base}
	for _, rec := range audit.Records {
		row := &api.AuditRecord{
			Seq: rec.Seq, Time: rec.Time.Format(time.RFC3339Nano), Kind: string(rec.Kind), By: string(rec.By),
			Name: rec.Name, Node: string(rec.Node), Detail: rec.Detail, Hash: rec.Hash,
		}
		if rec.Volume != 0 {
			row.Volume = rec.Volume.String()
		}
		out.Records = append(out.Records, row)
	}
	return out, nil
}
