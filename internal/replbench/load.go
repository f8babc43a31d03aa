package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/pprof"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// load is what to do, for how long.
type load struct {
	What    string `json:"what"` // flush, singles or entries; of a writer: always the same
	Depth   int    `json:"depth"`
	Bytes   int    `json:"bytes"` // of one operation
	Seconds int    `json:"seconds"`
}

// result is what came of it.
type result struct {
	Ops       int64 `json:"ops"`
	Micros    int64 `json:"micros"` // elapsed
	P50Micros int64 `json:"p50Micros"`
	P99Micros int64 `json:"p99Micros"`
}

func (r result) perSecond() float64 { return float64(r.Ops) / (float64(r.Micros) / 1e6) }

// drive calls op from l.Depth goroutines until the time is over. Each has a random source of its own.
func drive(l load, op func(worker int, rnd *rand.Rand) error) (result, error) {
	if l.Depth < 1 || l.Seconds < 1 {
		return result{}, fmt.Errorf("load %+v: depth and seconds must be positive", l)
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	times := make([][]int64, l.Depth)
	errs := make([]error, l.Depth)
	began := time.Now()
	timer := time.AfterFunc(time.Duration(l.Seconds)*time.Second, func() { stop.Store(true) })
	defer timer.Stop()
	for i := range l.Depth {
		times[i] = make([]int64, 0, 1<<16)
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 1)) //nolint:gosec // offsets, not secrets
			for !stop.Load() {
				at := time.Now()
				if errs[i] = op(i, rnd); errs[i] != nil {
					stop.Store(true)
					return
				}
				times[i] = append(times[i], time.Since(at).Microseconds())
			}
		})
	}
	wg.Wait()
	r := result{Micros: time.Since(began).Microseconds()}
	all := slices.Concat(times...)
	slices.Sort(all)
	for _, err := range errs {
		if err != nil {
			return r, err
		}
	}
	if len(all) == 0 {
		return r, fmt.Errorf("load %+v: nothing was done", l)
	}
	r.Ops = int64(len(all))
	r.P50Micros, r.P99Micros = all[len(all)/2], all[len(all)*99/100]
	return r, nil
}

// used returns what this process has used so far.
func used() (usage, error) {
	var ru syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &ru); err != nil {
		return usage{}, err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	micros := func(t syscall.Timeval) int64 { return t.Sec*1e6 + t.Usec }
	return usage{micros(ru.Utime) + micros(ru.Stime), m.Mallocs, m.TotalAlloc}, nil
}

// profile writes a CPU profile of this process to a file until it is called with none.
func profile(file string) error {
	if file == "" {
		pprof.StopCPUProfile()
		return nil
	}
	f, err := os.Create(file) // closed with the process
	if err != nil {
		return err
	}
	return pprof.StartCPUProfile(f)
}
