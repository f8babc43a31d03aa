package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication"
)

const (
	parkedN     = 1000
	parkedFirst = 1000 // before them, so that everything of a fixed size is full: 64 MiB of entries of the log
	parkedBatch = 50   // that run at the same time before they are parked
	parkedFrom  = trivet.VolumeID(10_000)
	// parkedEntryBytes and parkedEntries are what each volume has in its log when it is parked.
	parkedEntryBytes = 64 << 10
	parkedEntries    = 4
)

// parked: what volumes cost that nobody uses and that were written to before.
func (l *lab) parked(out io.Writer) error {
	idle, err := l.restingCPU()
	if err != nil {
		return err
	}
	if err := l.park(0, parkedFirst); err != nil {
		return err
	}
	before, err := l.memory()
	if err != nil {
		return err
	}
	if err := l.park(parkedFirst, parkedFirst+parkedN); err != nil {
		return err
	}
	cpu, err := l.restingCPU()
	if err != nil {
		return err
	}
	after, err := l.memory()
	if err != nil {
		return err
	}
	var more []float64
	for i := range after {
		more = append(more, float64(after[i]-before[i])/(1<<20))
	}
	fmt.Fprintf(out, "%d parked volumes: %.1f MiB a node more than before (at most 20), at most %.1f; "+
		"CPU of three processes %.2f %% of a core, without them %.2f %%, that of two running groups included\n",
		parkedN, median(more), slices.Max(more), cpu, idle)
	return nil
}

// park makes volumes, writes to each, and parks them.
func (l *lab) park(from, to int) error {
	for n := from + parkedBatch; n <= to; n += parkedBatch {
		for _, do := range []string{"unpark", "touch", "park"} {
			for _, c := range l.nodes {
				if _, err := c.call(ask{Do: do, N: n}); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// restingCPU returns what the nodes use with nothing to do, in % of a core.
func (l *lab) restingCPU() (float64, error) {
	time.Sleep(5 * time.Second) // until what was begun before is done
	from, err := l.usage()
	if err != nil {
		return 0, err
	}
	time.Sleep(time.Duration(l.o.idleSeconds) * time.Second)
	to, err := l.usage()
	return float64(to.minus(from).CPUMicros) / float64(l.o.idleSeconds) / 1e6 * 100, err
}

// memory returns the resident set of each node, without what its runtime can do without.
func (l *lab) memory() ([]int64, error) {
	var all []int64
	for _, c := range l.nodes {
		r, err := c.call(ask{Do: "memory"})
		if err != nil {
			return nil, err
		}
		all = append(all, int64(r.Bytes))
	}
	return all, nil
}

func resident() (uint64, error) {
	debug.FreeOSMemory()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0, fmt.Errorf("statm is %q: %w", b, trivet.ErrCorrupt)
	}
	pages, err := strconv.ParseUint(fields[1], 10, 64)
	return pages * uint64(os.Getpagesize()), err
}

// batch calls f for each volume of the last parkedBatch up to the n-th, side by side: a fence waits for a lease.
func (b *bench) batch(n int, f func(ctx context.Context, s replication.ReplicaSpec) error) error {
	b.mu.Lock()
	where := b.where
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var all errgroup.Group
	for i := n - parkedBatch; i < n; i++ {
		id := parkedFrom + trivet.VolumeID(i)
		all.Go(func() error {
			return f(ctx, replication.ReplicaSpec{
				Volume: id, Replica: replicaOn(b.name, id), Disk: b.disk.Replication(), SizeBytes: 1 << 30,
				Members: members(where, id),
			})
		})
	}
	return all.Wait()
}

// unpark makes and starts replicas.
func (b *bench) unpark(n int) error {
	return b.batch(n, func(ctx context.Context, s replication.ReplicaSpec) error {
		return errors.Join(b.host.CreateReplica(ctx, s), b.host.OpenReplica(ctx, s))
	})
}

// touch waits until the volumes have a leader, and writes to those that this node leads.
func (b *bench) touch(n int) error {
	data := make([]byte, parkedEntryBytes)
	fillRandom(data)
	return b.batch(n, func(ctx context.Context, s replication.ReplicaSpec) error {
		r, ok := b.host.Replica(s.Volume)
		if !ok {
			return fmt.Errorf("no replica of %s: %w", s.Volume, trivet.ErrNotFound)
		}
		for {
			changed, st := r.Changed(), r.Status()
			if st.IsLeader {
				if err := b.write(ctx, r, s, data); !errors.Is(err, trivet.ErrNotLeader) && !errors.Is(err, trivet.ErrUnavailable) {
					return err
				}
			} else if st.Leader != "" {
				return nil // whoever leads writes
			}
			select {
			case <-changed:
			case <-time.After(pollEvery):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
}

func (b *bench) write(ctx context.Context, r *replication.Replica, s replication.ReplicaSpec, data []byte) error {
	epoch := r.Status().Epoch + 1 // leadership may have come from a node that has written already
	if err := r.Fence(ctx, epoch); err != nil {
		return err
	}
	v, err := replication.OpenVolume(replication.VolumeConfig{
		ID: s.Volume, SizeBytes: s.SizeBytes, Epoch: epoch, Members: s.Members, Network: b.peers, Host: b.host,
	})
	if err != nil {
		return err
	}
	for i := range parkedEntries {
		err = errors.Join(err, v.WriteAt(ctx, data, int64(i*parkedEntryBytes)))
	}
	return errors.Join(err, v.Close())
}
