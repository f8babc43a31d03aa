package main

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/trivet-csi/trivet"
)

// quietBlocksMax is how many references a quiet turn may put into the map: of some 50 bytes each, in a memtable of 16
// MiB, which is flushed once it is full.
const quietBlocksMax = 1 << 17

// turn is what one turn of the phase latency did.
type turn struct {
	waits   []time.Duration // of entries, into the buffer that it was given
	cleaned int64           // bytes that cleaning copied
	flushes int             // of the map
	merged  int64           // bytes of the map that were written
}

// latency measures how long an entry takes to be logged and applied, in turns: while segments are cleaned, and the map
// flushed and the log cut as they are behind a replica, and with neither. The store is opened anew for each turn, since
// that is where cleaning is turned on and off. The first turn of either kind does not count: it makes the log's files.
func (b *bench) latency(dir string) error {
	o := &b.o
	cfg := b.config(dir)
	b.note("latency: a store of %d MiB is written", o.mib)
	if err := b.fillForReads(cfg); err != nil {
		return err
	}
	var pooled [2][]time.Duration // quiet, busy
	var sums [2]turn
	for k := range pooled {
		pooled[k] = make([]time.Duration, 0, o.rounds*o.entries)
		clear(pooled[k][:cap(pooled[k])]) // touched
	}
	scratch := make([]time.Duration, o.entries)
	for round := range o.rounds + 1 {
		for i := range 2 {
			kind := (round + i) % 2
			b.note("latency: round %d of %d, busy %t", round, o.rounds, kind == 1)
			t, err := b.turn(cfg, kind == 1, uint64(10+2*round+i), scratch)
			if err != nil {
				return err
			}
			if round == 0 {
				continue
			}
			pooled[kind] = append(pooled[kind], t.waits...)
			sums[kind].add(t)
		}
	}
	ms := func(kind int, q float64) float64 { return float64(quantile(pooled[kind], q).Nanoseconds()) / 1e6 }
	what := fmt.Sprintf("log + apply of %d blocks, p99.9, ms", o.entryBlocks)
	p := compared(what, 2, ms(1, 0.999), ms(0, 0.999), atMost(3))
	if sums[1].cleaned == 0 || sums[1].flushes == 0 {
		p.value, p.ratio = math.NaN(), math.NaN() // nothing went on: -mib or -entries are too small
	}
	printFigures(b.out, "latency, cleaning and flushes going on", "without", []figure{
		compared("log + apply, median, ms", 2, ms(1, 0.5), ms(0, 0.5), wanted{}), p,
	})
	fmt.Fprintf(b.out, "with: %d MiB cleaned, %d flushes of the map; without: %d MiB, %d, and %d KiB of the map merged\n",
		sums[1].cleaned>>20, sums[1].flushes, sums[0].cleaned>>20, sums[0].flushes, sums[0].merged>>10)
	return nil
}

func (t *turn) add(o turn) {
	t.cleaned, t.flushes, t.merged = t.cleaned+o.cleaned, t.flushes+o.flushes, t.merged+o.merged
}

// turn opens the store, and writes entries at random. Both kinds find it settled, so that the log has files enough.
func (b *bench) turn(cfg storeConfig, busy bool, seed uint64, waits []time.Duration) (t turn, err error) {
	cfg.manual = !busy
	s, r, err := openOne(cfg, b.o.mib<<20)
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := errors.Join(r.trim(r.st.AppliedIndex, 1), s.settle()); err != nil {
		return t, err
	}
	s.calm()
	t.cleaned, t.merged = -s.cleaned(), -s.eng.WrittenBytes()
	stop := func() (int, error) { return 0, nil }
	var applied chan uint64
	if busy {
		applied = make(chan uint64, 1)
		stop = b.cutBehind(r, applied)
	}
	err = r.timed(waits, b.o.entryBlocks, atRandom(r.blockN, newRand(seed)), b.bufs, applied)
	flushes, stopErr := stop()
	t.waits, t.flushes = waits, flushes
	t.cleaned, t.merged = t.cleaned+s.cleaned(), t.merged+s.eng.WrittenBytes()
	if !busy && t.cleaned != 0 {
		stopErr = errors.Join(stopErr, fmt.Errorf("%d bytes were cleaned in a quiet turn", t.cleaned))
	}
	return t, errors.Join(err, stopErr)
}

// timed logs and applies an entry for each of waits, which it fills. applied, unless nil, is told now and then how far
// it is.
func (r *replica) timed(waits []time.Duration, entryBlocks int, next places, bufs [][]byte,
	applied chan<- uint64,
) error {
	lbas := make([]trivet.LBA, entryBlocks)
	every := max(len(waits)/cutsOfTurn, 1)
	for i := range waits {
		next(lbas)
		began := time.Now()
		if err := r.entry(lbas, bufs[i%len(bufs)]); err != nil {
			return err
		}
		waits[i] = time.Since(began)
		if applied != nil && i%every == every-1 {
			select {
			case applied <- r.st.AppliedIndex:
			default: // the cut before is still under way
			}
		}
	}
	return nil
}

// cutsOfTurn is how often the map is flushed and the log cut in a busy turn.
const cutsOfTurn = 4

// cutBehind flushes the map and cuts the log beside the applier, each time that it is told how far that is. stop waits
// for the last and returns how many there were.
func (b *bench) cutBehind(r *replica, applied chan uint64) (stop func() (int, error)) {
	type outcome struct {
		n   int
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		var o outcome
		for index := range applied {
			if o.err == nil {
				o.err = r.trim(index, retainedN(b.o.entryBlocks))
				o.n++
			}
		}
		done <- o
	}()
	return func() (int, error) {
		close(applied)
		o := <-done
		return o.n, o.err
	}
}
