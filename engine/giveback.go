package engine

import "time"

const (
	// giveBackAge is for how long a segment that nothing refers to may wait to be given back.
	giveBackAge = 5 * time.Second

	// Segments are given back sooner once they are giveBackSegmentsMax, or take a sixteenth of the room that is
	// left, but not for fewer than giveBackSegmentsMin. Giving back flushes the map, and two flushes have the tables of
	// the next level merged, the whole map under random writes: at 128 MiB of writes to a flush that was a
	// quarter of the CPU of a busy node (docs/benchmarks.md).
	giveBackSegmentsMin = 2
	giveBackSegmentsMax = 16
	giveBackDivisor     = 16

	// trimAge is how long files of the log may wait to be used again, at least, before they go back to the filesystem.
	trimAge = time.Minute
)

// giveBack gives back the segments that nothing refers to, in memory or on disk. With flush what is in memory is made
// durable first, if there are any.
func (e *Engine) giveBack(flush bool) (int, error) {
	if err := e.enterWrite(); err != nil {
		return 0, err
	}
	defer e.exit()
	if e.live.deadN() == 0 {
		return 0, nil
	}
	if flush {
		if err := e.flush(); err != nil {
			return 0, err
		}
	}
	return e.live.release(e.flushed.Load()), nil
}

// giveBack is Engine.giveBack. Paced, it flushes only if that is worth it, and else gives back what flushes for the
// sake of others, as of a group that cuts its log, have set free. REQUIRES: turn.
func (c *cleaner) giveBack(paced bool) (released int, err error) {
	if paced {
		released, err = c.e.giveBack(false)
		if err != nil || !c.giveBackIsDue() {
			return released, err
		}
	}
	c.gaveAt = time.Now()
	n, err := c.e.giveBack(true)
	return released + n, err
}

// giveBackIsDue reports whether the segments that nothing refers to are worth a flush of the map now. REQUIRES: turn.
func (c *cleaner) giveBackIsDue() bool {
	n := c.e.live.deadN()
	return n > 0 && (c.pressure.Load() || time.Since(c.gaveAt) >= giveBackAge || n >= c.e.space.giveBackAt())
}

// lookIn is the time after which the background has to look whether something waits to be given back; long when
// nothing does.
func (c *cleaner) lookIn() time.Duration {
	switch {
	case c.e.live.deadN() > 0:
		return giveBackAge
	case c.trimLeft > 0:
		return trimAge
	}
	return time.Hour
}

// trim gives back to the filesystem files of the log that nobody has needed for a while. On a disk that runs full they
// stay the log's own, which could not make new ones there. Only the loop calls it.
func (c *cleaner) trim() error {
	if c.pressure.Load() || time.Since(c.trimmedAt) < trimAge {
		return nil
	}
	_, left, err := c.e.log.Trim()
	c.trimmedAt, c.trimLeft = time.Now(), left
	return err
}

// giveBackAt is the number of segments that are worth a flush.
func (s *space) giveBackAt() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unknown {
		return giveBackSegmentsMin
	}
	n := s.left / giveBackDivisor / s.log.SegmentBytes()
	return int(min(max(n, giveBackSegmentsMin), giveBackSegmentsMax))
}

// Tight reports whether the disk runs full: cleaning is not held back then. False without a log.
func (e *Engine) Tight() bool { return e.clean != nil && e.clean.pressure.Load() }

// deadN is how many segments nothing refers to.
func (l *live) deadN() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.dead)
}
