package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/replication"
)

const (
	// explainWindow is long enough for a few hundred requests of a slow volume, and for somebody who waits.
	explainWindow = 2 * time.Second
	// explainGrace is for how much longer than the window a node is waited for.
	explainGrace = 2 * time.Second
)

// ExplainVolume implements api.AdminServer.
func (a *admin) ExplainVolume(r *api.ExplainVolumeRequest, stream grpc.ServerStreamingServer[api.VolumeReport]) error {
	window := time.Duration(r.GetWindowMilliseconds()) * time.Millisecond
	if window == 0 {
		window = explainWindow
	}
	if window < 0 || window > stage.WindowMax {
		return fmt.Errorf("window of %v: want at most %v: %w", window, stage.WindowMax, trivet.ErrInvalid)
	}
	for stream.Context().Err() == nil {
		v, err := a.find(stream.Context(), r.GetName()) // each time: it may move
		if err != nil {
			return err
		}
		report, err := a.explain(stream.Context(), &v, window)
		if err != nil {
			return err
		}
		if err := stream.Send(report); err != nil {
			return err
		}
	}
	return nil
}

// servers are the nodes that serve a volume: where it is attached first, then those with replicas.
func servers(v *meta.Volume) []trivet.NodeID {
	var nodes []trivet.NodeID
	if n := v.Holder(); n != "" {
		nodes = append(nodes, n)
	}
	for _, r := range v.Replicas {
		if !slices.Contains(nodes, r.Node) {
			nodes = append(nodes, r.Node)
		}
	}
	return nodes
}

// explain watches v on all its nodes at once.
func (a *admin) explain(ctx context.Context, v *meta.Volume, window time.Duration) (*api.VolumeReport, error) {
	nodes := servers(v)
	windows, errs := make([]stage.Window, len(nodes)), make([]error, len(nodes))
	var asking sync.WaitGroup
	for i, node := range nodes {
		asking.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, window+explainGrace)
			defer cancel()
			windows[i], errs[i] = replication.QueryStages(ctx, a.s.network, node, v.ID, window)
		})
	}
	asking.Wait()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	out := &api.VolumeReport{
		Id: v.ID.String(), Name: v.Name, AttachedNode: string(v.Holder()), WindowSeconds: window.Seconds(),
	}
	in := stage.Input{Name: v.Name, Params: v.Params, Attached: string(v.Holder())}
	for i, node := range nodes {
		switch {
		case errors.Is(errs[i], trivet.ErrNotFound): // parked, or not opened yet: nothing happens there
		case errs[i] != nil:
			out.Silent = append(out.Silent, string(node))
		default:
			in.Windows = append(in.Windows, windows[i])
			for _, s := range windows[i].Stages {
				out.Stages = append(out.Stages, stageReport(&s))
			}
			if c := windows[i].Cache; c != nil && c.SizeBytes > 0 && out.Cache == nil {
				out.Cache = cacheReport(c, node)
			}
			if d := windows[i].Device; d != nil {
				out.Devices = append(out.Devices, &api.DeviceReport{
					Node: string(node), Path: d.Path, Tells: d.Tells, Repeated: d.Repeated, Refused: d.Refused,
				})
			}
		}
	}
	f := stage.Explain(in)
	out.LimitingStage, out.Reason, out.Advice = f.Stage, f.Reason, f.Advice
	return out, nil
}

func stageReport(s *stage.Summary) *api.StageReport {
	return &api.StageReport{
		Stage: s.Stage, Node: s.Node, Count: s.Count, ArrivalRate: s.ArrivalRate, DepartureRate: s.DepartureRate,
		Mean: s.Mean, StandardDeviation: s.StdDev, P50: s.P50, P99: s.P99, Max: s.Max, Concurrency: s.Concurrency,
		LittleConcurrency: s.Little, Utilisation: s.Utilisation, ServiceRate: s.ServiceRate, Samples: s.Samples,
	}
}

func cacheReport(c *stage.CacheSummary, node trivet.NodeID) *api.CacheReport {
	r := &api.CacheReport{
		Node: string(node), Mode: c.Mode, Eviction: c.Eviction, SizeBytes: c.SizeBytes, DirtyBytes: c.DirtyBytes,
		CleanBytes: c.CleanBytes, Hits: c.Hits, Misses: c.Misses, Writes: c.Writes, Merged: c.Merged,
		WriteBacks: c.WriteBacks, WriteBackBytes: c.WriteBackBytes, ReadAheadBytes: c.ReadAheadBytes, Delayed: c.Delayed,
		Stalled: c.Stalled, FlushBytes: c.FlushBytes, FlushDepth: c.FlushDepth, ReadAheadLimit: c.ReadAheadLimit,
		Adaptive: c.Adaptive,
	}
	for _, h := range c.ByEviction {
		r.ByEviction = append(r.ByEviction, &api.HitCount{Eviction: h.Eviction, Hits: h.Hits, Misses: h.Misses})
	}
	return r
}
