package server

import (
	"context"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
)

// RecoverVolume implements api.AdminServer.
func (a *admin) RecoverVolume(ctx context.Context, r *api.RecoverVolumeRequest) (*api.RecoverVolumeResponse, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	done, err := a.s.controller.RecoverVolume(ctx, v.ID, r.GetAcceptDataLoss(), a.logEnd)
	if err != nil {
		return nil, err
	}
	out := &api.RecoverVolumeResponse{
		Volume: a.volume(ctx, done.Volume, false), Replica: string(done.Survivor.Replica), Node: string(done.Survivor.Node),
		LastIndex: done.Survivor.Index, LastTerm: done.Survivor.Term, Warning: done.Warning(),
	}
	if !done.Since.IsZero() {
		out.LastHeard = done.Since.UTC().Format(time.RFC3339)
	}
	for _, l := range done.Lost {
		out.Lost = append(out.Lost, fmt.Sprintf("%s on %s (%s)", l.ID, l.Node, l.State))
	}
	return out, nil
}

// logEnd asks a node where the log of its replica ends.
func (a *admin) logEnd(ctx context.Context, node trivet.NodeID, id trivet.VolumeID) (term, index uint64, err error) {
	st, err := a.replicaStatus(ctx, id, node)
	return st.LastTerm, st.LastIndex, err
}

// RecoverCatalogue implements api.AdminServer.
func (a *admin) RecoverCatalogue(ctx context.Context, r *api.RecoverCatalogueRequest) (
	*api.RecoverCatalogueResponse, error,
) {
	done, err := a.s.catalogue.Recover(ctx, r.GetAcceptDataLoss())
	if err != nil {
		return nil, err
	}
	out := &api.RecoverCatalogueResponse{
		Cluster: string(done.Cluster), Node: string(done.Survivor.Node), LastIndex: done.Survivor.Index,
		LastTerm: done.Survivor.Term, Warning: done.Warning(),
	}
	for _, m := range done.Kept {
		out.Kept = append(out.Kept, string(m.Node))
	}
	for _, m := range done.Lost {
		out.Lost = append(out.Lost, string(m.Node))
	}
	return out, nil
}
