package server_test

import (
	"context"
	"errors"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/api"
)

// BenchmarkFailover kills the process that leads a volume, once in each iteration, while a client on
// another node writes and flushes, and reports the time from the SIGKILL to the answer of the first write
// and flush begun after it. Run it with -benchtime 100x.
func BenchmarkFailover(b *testing.B) {
	f := newFleet(b)
	f.eventually("cluster init", func(ctx context.Context) error {
		_, err := f.processes[0].admin.InitCluster(ctx, &api.InitClusterRequest{})
		return err
	})
	f.awaitUp()
	f.eventually("create the volume", func(ctx context.Context) error {
		_, err := f.processes[2].admin.CreateVolume(ctx, &api.CreateVolumeRequest{Name: crashVolume, SizeBytes: 64 << 20})
		return err
	})
	served := f.serve(f.processes[2])
	defer served.end()
	var pauses []time.Duration
	for b.Loop() {
		victim := f.processes[len(pauses)%2] // never the client's own
		f.lead(victim)
		pauses = append(pauses, f.killUnderLoad(victim, served.client))
		f.start(victim)
		f.awaitUp()
		f.level()
	}
	slices.Sort(pauses)
	for name, at := range map[string]int{"p50-ms": len(pauses) / 2, "p99-ms": len(pauses) * 99 / 100} {
		b.ReportMetric(float64(pauses[at].Microseconds())/1000, name)
	}
	b.ReportMetric(float64(pauses[len(pauses)-1].Microseconds())/1000, "max-ms")
}

// lead moves the leadership of the volume to a process.
func (f *fleet) lead(p *process) {
	f.t.Helper()
	f.eventually("leader on "+string(p.cfg.Node), func(ctx context.Context) error {
		_, err := f.processes[2].admin.MoveLeader(ctx, &api.MoveLeaderRequest{Name: crashVolume, Node: string(p.cfg.Node)})
		return err
	})
}

// killUnderLoad kills a process while a client writes and returns how long the client had to wait.
func (f *fleet) killUnderLoad(p *process, c *nbdClient) time.Duration {
	f.t.Helper()
	killed := make(chan time.Time, 1)
	go func() {
		time.Sleep(100 * time.Millisecond) //nolint:forbidigo // the client writes meanwhile
		killed <- time.Now()
		_ = p.cmd.Process.Signal(syscall.SIGKILL) // p.exited tells
	}()
	var at time.Time
	for {
		began := time.Now()
		require.NoError(f.t, c.write(stamp(1, 1), 0))
		require.NoError(f.t, c.flush())
		select {
		case at = <-killed:
		default:
		}
		if !at.IsZero() && began.After(at) {
			<-p.exited
			return time.Since(at)
		}
	}
}

// level waits until every replica of the volume has caught up, as the next kill demands.
func (f *fleet) level() {
	f.t.Helper()
	f.eventually("replicas level", func(ctx context.Context) error {
		v, err := f.processes[2].admin.GetVolume(ctx, &api.VolumeRequest{Name: crashVolume})
		if err != nil {
			return err
		}
		most := uint64(0)
		for _, r := range v.GetReplicas() {
			most = max(most, r.GetApplied())
		}
		for _, r := range v.GetReplicas() {
			if r.GetApplied() != most || r.GetTerm() == 0 {
				return errors.New("a replica is behind")
			}
		}
		return nil
	})
}
