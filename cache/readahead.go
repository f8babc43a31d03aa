package cache

import "github.com/trivet-csi/trivet"

const (
	// ReadAheadMax is the longest read-ahead in bytes.
	ReadAheadMax = 1 << 20

	streamsMax     = 8  // sequential readers that are told apart
	aheadFirst     = 16 // blocks of the first read-ahead of a run; it doubles from there
	aheadPiece     = 32 // blocks a fetch
	fetchersN      = 4
	fetchesMax     = 32 // waiting; more are forgotten
	runBeforeAhead = 2  // reads in a row before the first read-ahead
)

// fetch is blocks to be read ahead.
type fetch struct {
	lba trivet.LBA
	n   int
}

// stream is a run of reads that follow one another.
type stream struct {
	next   trivet.LBA // where the next read of the run begins
	ahead  trivet.LBA // up to where was read ahead
	window int        // blocks
	runN   int
	used   uint64
}

// streams finds sequential runs among reads, as Linux does for files (mm/readahead.c: a window that doubles, and is
// refilled when half of it is used up). A read that continues no run begins one, in the place of the one not used for
// longest; so random reads never get as far as a read-ahead. It is pure.
type streams struct {
	all   [streamsMax]stream
	clock uint64
}

// note takes note of a read and returns what to read ahead: from, and how many blocks, at most limit. Zero: nothing. It
// also returns whether the read goes on with a run.
func (t *streams) note(lba trivet.LBA, n, limit int) (from trivet.LBA, ahead int, follows bool) {
	t.clock++
	s := &t.all[0]
	for i := range t.all {
		c := &t.all[i]
		if c.used != 0 && (lba == c.next || lba > c.next && lba < c.ahead) {
			from, ahead = c.goOn(lba, n, limit, t.clock)
			return from, ahead, true
		}
		if c.used < s.used {
			s = c
		}
	}
	*s = stream{next: lba + trivet.LBA(n), used: t.clock}
	return 0, 0, false
}

func (s *stream) goOn(lba trivet.LBA, n, limit int, clock uint64) (trivet.LBA, int) {
	s.next, s.used = lba+trivet.LBA(n), clock
	s.runN++
	s.ahead = max(s.ahead, s.next)
	if s.runN < runBeforeAhead || int(s.ahead-s.next) > s.window/2 {
		return 0, 0
	}
	s.window = min(max(2*s.window, aheadFirst, n), limit)
	from, to := s.ahead, s.next+trivet.LBA(s.window)
	if to <= from {
		return 0, 0
	}
	s.ahead = to
	return from, int(to - from)
}

// readAheadLocked notes a read and starts what it is worth to read ahead.
func (d *Device) readAheadLocked(lba trivet.LBA, n int) {
	limit := d.aheadBlocksLocked()
	if limit == 0 || d.set.NoClean {
		return
	}
	from, ahead, follows := d.streams.note(lba, n, limit)
	if follows && d.set.Adaptive {
		d.ahead.read(d.now(), n)
	}
	end := trivet.LBA(d.next.Size() / trivet.BlockSize)
	for ahead > 0 && from < end {
		piece := min(ahead, aheadPiece, int(end-from))
		select {
		case d.fetch <- fetch{from, piece}:
		default:
			return
		}
		from, ahead = from+trivet.LBA(piece), ahead-piece
	}
}

func (d *Device) runReadAhead() {
	d.fetch = make(chan fetch, fetchesMax)
	buf := make([]byte, fetchersN*aheadPiece*trivet.BlockSize)
	for i := range fetchersN {
		mine := buf[i*aheadPiece*trivet.BlockSize : (i+1)*aheadPiece*trivet.BlockSize]
		d.group.Go(func() error { d.fetcher(mine); return nil })
	}
}

func (d *Device) fetcher(buf []byte) {
	for {
		select {
		case <-d.life.Done():
			return
		case r := <-d.fetch:
			d.bring(r, buf)
		}
	}
}

// bring reads ahead what is not here yet of r.
func (d *Device) bring(r fetch, buf []byte) {
	d.mu.Lock()
	if d.t == nil {
		d.mu.Unlock()
		return
	}
	for r.n > 0 && d.t.index.get(r.lba) != none {
		r.lba, r.n = r.lba+1, r.n-1
	}
	for r.n > 0 && d.t.index.get(r.lba+trivet.LBA(r.n-1)) != none {
		r.n--
	}
	if r.n == 0 {
		d.mu.Unlock()
		return
	}
	f := d.beginFillLocked(r.lba, r.n, true)
	began := d.now()
	d.mu.Unlock()
	if f == nil {
		return
	}
	p := buf[:r.n*trivet.BlockSize]
	err := d.next.ReadAt(d.life, p, int64(r.lba)*trivet.BlockSize)
	d.endFill(f, p, err)
	d.mu.Lock()
	d.ahead.fetched(d.now() - began)
	d.mu.Unlock()
	if err != nil {
		_ = d.noteFence(err) // whoever reads the block gets its own answer
	}
}
