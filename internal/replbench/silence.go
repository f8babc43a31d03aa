package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet"
)

const (
	silences   = 11
	fenceTries = 5
	// silenceFor is how long the leader says nothing: longer than any election takes.
	silenceFor = 5 * time.Second
	// electionTimeout is how long a follower waits for a silent leader at least: the default Heartbeat.
	electionTimeout = time.Second
)

// silence: how long a client on another node waits when the node that leads says nothing any more, as in a black hole:
// its process is stopped, and no connection ends.
func (l *lab) silence(out io.Writer) error {
	client := l.nodes[1]
	var all []float64
	for range silences {
		r, err := l.fenced()
		if err != nil {
			return err
		}
		if _, err := client.call(ask{Do: "watch", N: int(r.Applied)}); err != nil {
			return err
		}
		time.Sleep(pollEvery)
		if err := l.leader.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			return err
		}
		time.Sleep(silenceFor)
		if err := l.leader.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			return err
		}
		if r, err = client.call(ask{Do: "watched"}); err != nil {
			return err
		}
		all = append(all, float64(r.Micros)/1e6/electionTimeout.Seconds())
	}
	fmt.Fprintf(out, "silent leader: "+
		"a client elsewhere waits %.2f election timeouts (p50, at most 1.5), at most %.2f of %d\n",
		median(all), slices.Max(all), len(all))
	return l.awaitLeader()
}

// fenced has the leader raise the epoch. One that has just been silent may not know yet that it leads no more.
func (l *lab) fenced() (r answer, err error) {
	for range fenceTries {
		if err := l.awaitLeader(); err != nil {
			return answer{}, err
		}
		if r, err = l.leader.call(ask{Do: "fence"}); err == nil {
			return r, nil
		}
		time.Sleep(electionTimeout)
	}
	return answer{}, err
}

// watcher writes a block again and again, and remembers the longest time that one took.
type watcher struct {
	stop    context.CancelFunc
	done    sync.WaitGroup
	longest time.Duration
	err     error
}

// watch begins to write to the volume.
func (b *bench) watch(epoch trivet.Epoch) error {
	v, err := b.attach(epoch)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	w := &watcher{stop: stop}
	b.watcher = w
	block := make([]byte, trivet.BlockSize)
	if err := v.WriteAt(ctx, block, 0); err != nil { // it has found the leader
		return err
	}
	w.done.Go(func() {
		defer v.Close() //nolint:errcheck // it only waits
		for ctx.Err() == nil {
			began := time.Now()
			if err := v.WriteAt(context.WithoutCancel(ctx), block, 0); err != nil {
				w.err = err
				return
			}
			w.longest = max(w.longest, time.Since(began))
		}
	})
	return nil
}

// watched ends watch and returns the longest time that a write took.
func (b *bench) watched() (time.Duration, error) {
	w := b.watcher
	if w == nil {
		return 0, fmt.Errorf("nobody watches: %w", trivet.ErrInvalid)
	}
	w.stop()
	w.done.Wait()
	return w.longest, w.err
}
