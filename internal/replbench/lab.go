package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
)

const pollEvery = 100 * time.Millisecond

var nodeNames = []trivet.NodeID{"n1", "n2", "n3"}

// lab is the three nodes, and three writers as their yardstick.
type lab struct {
	ctx     context.Context
	o       *options
	nodes   []*child
	writers []*child
	leader  *child
}

func newLab(ctx context.Context, o *options) (l *lab, err error) {
	l = &lab{ctx: ctx, o: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	ca, err := pki.NewCA(trivet.ClusterID(trivet.NewUUID()), pki.For(pki.CAValidity))
	if err != nil {
		return l, err
	}
	where := map[trivet.NodeID]string{}
	for i, n := range nodeNames {
		if err := l.startNode(ca, n); err != nil {
			return l, err
		}
		r, err := l.nodes[i].call(ask{Do: "hello"})
		if err != nil {
			return l, err
		}
		where[n] = r.Address
		w, err := startChild(roleWriter, fmt.Sprintf("w%d", i+1), o)
		if err != nil {
			return l, err
		}
		l.writers = append(l.writers, w)
	}
	for _, n := range l.nodes {
		if _, err := n.call(ask{Do: "join", Addresses: where}); err != nil {
			return l, err
		}
	}
	return l, l.awaitLeader()
}

func (l *lab) startNode(ca *pki.CA, n trivet.NodeID) error {
	dir := filepath.Join(l.o.dir, string(n), "certs")
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	id := pki.Identity{Cluster: ca.Cluster(), Role: pki.RoleNode, Name: string(n)}
	pair, err := ca.Issue(id, pki.For(pki.LeafValidity))
	if err != nil {
		return err
	}
	if err := pki.Write(dir, ca.CertPEM(), pair); err != nil {
		return err
	}
	c, err := startChild(roleNode, string(n), l.o)
	if err != nil {
		return err
	}
	l.nodes = append(l.nodes, c)
	return nil
}

// awaitLeader waits until the first node leads both groups. They elect independently, so the others give
// up what they won.
func (l *lab) awaitLeader() error {
	l.leader = l.nodes[0]
	for end := time.Now().Add(time.Minute); time.Now().Before(end) && l.ctx.Err() == nil; time.Sleep(pollEvery) {
		r, err := l.leader.call(ask{Do: "status"})
		if err != nil {
			return err
		}
		if r.Leads {
			return nil
		}
		for _, n := range l.nodes[1:] {
			if _, err := n.call(ask{Do: "yield", To: nodeNames[0]}); err != nil {
				fmt.Fprintf(os.Stderr, "replbench: %v (tried again)\n", err)
			}
		}
	}
	return fmt.Errorf("%s does not lead both groups: %w", nodeNames[0], trivet.ErrUnavailable)
}

func (l *lab) close() error {
	var errs []error
	for _, c := range slices.Concat(l.writers, l.nodes) {
		errs = append(errs, c.close())
	}
	return errors.Join(errs...)
}

// load lets the leader work, and returns what the three nodes used together.
func (l *lab) load(w load) (result, usage, error) {
	before, err := l.usage()
	if err != nil {
		return result{}, usage{}, err
	}
	w.Seconds = l.o.seconds
	var r answer
	err = l.profiled(w.What, func() error {
		r, err = l.leader.call(ask{Do: "load", Load: w})
		return err
	})
	if err != nil {
		return result{}, usage{}, err
	}
	after, err := l.usage()
	return r.Result, after.minus(before), err
}

func (l *lab) usage() (sum usage, err error) {
	for _, n := range l.nodes {
		r, err := n.call(ask{Do: "usage"})
		if err != nil {
			return usage{}, err
		}
		sum = sum.plus(r.Usage)
	}
	return sum, nil
}

// yardstick lets the three writers work at the same time, and returns the middle one's p50.
func (l *lab) yardstick() (p50 float64, err error) {
	results := make([]answer, len(l.writers))
	errs := make([]error, len(l.writers))
	var wg sync.WaitGroup
	for i, w := range l.writers {
		wg.Go(func() {
			results[i], errs[i] = w.call(ask{Do: "load", Load: load{Depth: 1, Bytes: trivet.BlockSize, Seconds: l.o.seconds}})
		})
	}
	wg.Wait()
	var all []float64
	for _, r := range results {
		all = append(all, float64(r.Result.P50Micros))
	}
	return median(all), errors.Join(errs...)
}

func median(all []float64) float64 {
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2]
}

// latency: one 4 KiB write at a time, durable on a quorum, against three writers that sync a file each.
func (l *lab) latency(out io.Writer) error {
	var ratios, ours, theirs, cpu []float64
	for range l.o.rounds {
		y, err := l.yardstick()
		if err != nil {
			return err
		}
		r, u, err := l.load(load{What: "flush", Depth: 1, Bytes: trivet.BlockSize})
		if err != nil {
			return err
		}
		cpu = append(cpu, float64(u.CPUMicros)/float64(r.Ops))
		ours, theirs = append(ours, float64(r.P50Micros)), append(theirs, y)
		ratios = append(ratios, float64(r.P50Micros)/y)
	}
	fmt.Fprintf(out, "one 4 KiB write and flush, p50: %.0f µs; three writers: %.0f µs; ratio %.2f (at most 1.8); "+
		"CPU %.0f µs a write in three processes\n", median(ours), median(theirs), median(ratios), median(cpu))
	return nil
}

// entries: what log and network can do, without an engine.
func (l *lab) entries(out io.Writer) error {
	for _, size := range []int{64 << 10, 128 << 10} {
		blocks := float64(size / trivet.BlockSize)
		var ratios, rate, cpu, mallocs, copies []float64
		for range l.o.rounds {
			raw, err := raw3(l.ctx, l.o.dir, l.o.seconds)
			if err != nil {
				return err
			}
			r, u, err := l.load(load{What: "entries", Depth: 32, Bytes: size})
			if err != nil {
				return err
			}
			n := float64(r.Ops)
			rate = append(rate, r.perSecond()*blocks)
			ratios = append(ratios, r.perSecond()*blocks/raw)
			cpu = append(cpu, float64(u.CPUMicros)/(n*blocks))
			mallocs = append(mallocs, float64(u.Mallocs)/n/3)
			copies = append(copies, float64(u.AllocBytes)/(n*float64(size))/3)
		}
		fmt.Fprintf(out, "32 entries of %d KiB, no engine: %.0f blocks/s, %.2f of raw3x (at least 0.8); CPU %.1f µs a block "+
			"in three processes (at most 35); per entry and node %.1f allocations, %.2f bytes allocated per byte\n",
			size>>10, median(rate), median(ratios), median(cpu), median(mallocs), median(copies))
	}
	return nil
}

// singles: 32 single blocks outstanding, through the whole path with the real engine.
func (l *lab) singles(out io.Writer) error {
	var ratios, rate, cpu []float64
	for range l.o.rounds {
		raw, err := raw3(l.ctx, l.o.dir, l.o.seconds)
		if err != nil {
			return err
		}
		r, u, err := l.load(load{What: "singles", Depth: 32, Bytes: trivet.BlockSize})
		if err != nil {
			return err
		}
		rate = append(rate, r.perSecond())
		ratios = append(ratios, r.perSecond()/raw)
		cpu = append(cpu, float64(u.CPUMicros)/float64(r.Ops))
	}
	fmt.Fprintf(out, "32 single blocks, real engine: %.0f blocks/s, %.2f of raw3x (at least 0.25); CPU %.0f µs a block\n",
		median(rate), median(ratios), median(cpu))
	return nil
}

// transfer: how long a write waits that is begun together with a planned move of leadership.
func (l *lab) transfer(out io.Writer) error {
	var all []float64
	for range 21 {
		if err := l.awaitLeader(); err != nil {
			return err
		}
		r, err := l.leader.call(ask{Do: "transfer", To: nodeNames[1]})
		if err != nil {
			return err
		}
		all = append(all, float64(r.Micros)/1000)
	}
	slices.Sort(all)
	fmt.Fprintf(out, "planned transfer and a write through it: p50 %.1f ms (at most 20), max %.1f ms of %d\n",
		median(all), all[len(all)-1], len(all))
	return l.awaitLeader()
}

// idle: what groups cost that run and have nothing to do.
func (l *lab) idle(out io.Writer) error {
	for _, want := range []struct{ n, percent int }{{100, 5}, {500, 15}} {
		for _, n := range l.nodes {
			if _, err := n.call(ask{Do: "idle", N: want.n}); err != nil {
				return err
			}
		}
		if err := l.awaitIdle(want.n); err != nil {
			return err
		}
		before, err := l.usage()
		if err != nil {
			return err
		}
		err = l.profiled(fmt.Sprintf("idle%d", want.n), func() error {
			time.Sleep(time.Duration(l.o.idleSeconds) * time.Second)
			return nil
		})
		if err != nil {
			return err
		}
		after, err := l.usage()
		if err != nil {
			return err
		}
		cpu := float64(after.minus(before).CPUMicros) / float64(l.o.idleSeconds) / 1e6 * 100
		fmt.Fprintf(out, "%d idle groups: %.1f %% of a core in three processes (at most %d)\n", want.n, cpu, want.percent)
	}
	return nil
}

// awaitIdle waits until each of the idle groups has a leader, as every node sees it, and for a little longer.
func (l *lab) awaitIdle(n int) error {
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end) && l.ctx.Err() == nil; time.Sleep(time.Second) {
		ready := 0
		for _, c := range l.nodes {
			r, err := c.call(ask{Do: "status"})
			if err != nil {
				return err
			}
			ready += r.Idle
		}
		if ready == n*len(l.nodes) {
			time.Sleep(5 * time.Second)
			return nil
		}
	}
	return fmt.Errorf("%d groups have not all a leader: %w", n, trivet.ErrUnavailable)
}

// profiled runs a measurement while the nodes write profiles of themselves, if that is wanted.
func (l *lab) profiled(name string, f func() error) error {
	if l.o.profile == "" {
		return f()
	}
	for _, n := range l.nodes {
		file, err := filepath.Abs(filepath.Join(l.o.profile, name+"-"+n.name+".pprof"))
		if err != nil {
			return err
		}
		if _, err := n.call(ask{Do: "profile", File: file}); err != nil {
			return err
		}
	}
	err := f()
	for _, n := range l.nodes {
		_, stop := n.call(ask{Do: "profile"})
		err = errors.Join(err, stop)
	}
	return err
}

// catchUp: a replica misses 256 MiB of a volume of 10 GiB and pulls what changed.
func (l *lab) catchUp(out io.Writer) error {
	const missedMiB = 256
	away := l.nodes[2]
	var moved, speed []float64
	for range l.o.rounds {
		yard, err := copyFile(l.ctx, l.o.dir, missedMiB)
		if err != nil {
			return err
		}
		if _, err := away.call(ask{Do: "away"}); err != nil {
			return err
		}
		if _, err := l.leader.call(ask{Do: "fill", N: missedMiB}); err != nil {
			return err
		}
		began := time.Now()
		before, err := away.call(ask{Do: "where"})
		if err != nil {
			return err
		}
		var after answer
		err = l.profiled("catchup", func() error {
			if _, err := away.call(ask{Do: "back"}); err != nil {
				return err
			}
			after, err = l.level(away)
			return err
		})
		if err != nil {
			return err
		}
		took := time.Since(began).Seconds()
		moved = append(moved, float64(after.Bytes-before.Bytes)/(missedMiB<<20))
		speed = append(speed, missedMiB/took/yard)
	}
	fmt.Fprintf(out, "catch-up over %d MiB of 10 GiB: %.2f of what was missed was received (at most 1.1); %.2f of an "+
		"O_DIRECT copy's speed (at least 0.5)\n", missedMiB, median(moved), median(speed))
	return nil
}

// level waits until a node's replica has applied what the leader's has.
func (l *lab) level(c *child) (answer, error) {
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end) && l.ctx.Err() == nil; time.Sleep(pollEvery / 10) {
		want, err := l.leader.call(ask{Do: "where"})
		if err != nil {
			return answer{}, err
		}
		has, err := c.call(ask{Do: "where"})
		if err != nil || has.Applied >= want.Applied {
			return has, err
		}
	}
	return answer{}, fmt.Errorf("%s does not catch up: %w", c.name, trivet.ErrUnavailable)
}
