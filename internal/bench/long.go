package main

import (
	"math"
	"time"
)

const (
	// dirtyLimits is how often the limit of dirty data has to be written in a run of J1 and J4: what a cache acknowledges
	// from memory is then a small part of it, and what is left drains in the sync at the end, which is counted.
	dirtyLimits = 3

	// lengthenMax times its length is how long a run may become to write so much.
	lengthenMax = 3

	// lengthenSpare is how much longer than the speed of one run suggests the next one is.
	lengthenSpare = 1.25
)

// leastBytes is how much a run of the job has to write to each copy. The limit of dirty data is a part of the cache.
func (o *options) leastBytes(j *job) int64 {
	if !j.long {
		return 0
	}
	return dirtyLimits * o.cacheMiB << 20
}

// stretch is how long runs of a job on a system are: at first as long as all others, and longer once that has been too
// short to write what has to be written.
type stretch struct{ now, most time.Duration }

func newStretch(length time.Duration) *stretch {
	return &stretch{now: length, most: lengthenMax * length}
}

// untilLong calls run until it has written leastB to each copy, for longer each time. What counts is the last run
// alone. A system that is too slow for so much gets the longest run, which is marked.
func (s *stretch) untilLong(leastB int64, copies int, run func(time.Duration) (result, error)) (result, error) {
	for {
		r, err := run(s.now)
		if err != nil {
			return result{}, err
		}
		wrote := r.writtenB / int64(copies)
		if r.short = wrote < leastB; !r.short || s.now >= s.most {
			return r, nil
		}
		s.now = s.longer(float64(leastB) / float64(max(wrote, 1)))
	}
}

// longer is a length in whole seconds, as fio takes it, in which factor times as much is written.
func (s *stretch) longer(factor float64) time.Duration {
	seconds := max(math.Ceil(s.now.Seconds()*lengthenSpare*factor), math.Floor(s.now.Seconds())+1)
	if seconds >= s.most.Seconds() {
		return s.most
	}
	return time.Duration(seconds) * time.Second
}
