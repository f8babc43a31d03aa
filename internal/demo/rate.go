package main

import (
	"context"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// rateMeter writes to a file over and over, past the page cache, and counts what was written.
type rateMeter struct {
	path string

	file    *os.File
	written atomic.Int64
	ending  chan struct{}
	ended   chan error
}

const (
	rateChunk = 256 << 10
	rateBytes = 64 << 20 // the file's size; then it begins again
)

func (r *rateMeter) start() (err error) {
	r.file, err = os.OpenFile(r.path, os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o600)
	if err != nil {
		return err
	}
	chunk, err := unix.Mmap(-1, 0, rateChunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	for i := range chunk {
		chunk[i] = byte(i >> 4)
	}
	r.ending, r.ended = make(chan struct{}), make(chan error, 1)
	go func() {
		defer unix.Munmap(chunk) //nolint:errcheck // memory of ours
		for off := int64(0); ; off = (off + rateChunk) % rateBytes {
			select {
			case <-r.ending:
				r.ended <- nil
				return
			default:
			}
			if _, err := r.file.WriteAt(chunk, off); err != nil {
				r.ended <- err
				return
			}
			r.written.Add(rateChunk)
		}
	}()
	return nil
}

// watch returns how many bytes were written in each of n intervals.
func (r *rateMeter) watch(ctx context.Context, n int) []int64 {
	bars := make([]int64, 0, n)
	tick := time.NewTicker(plotEvery)
	defer tick.Stop()
	for before := r.written.Load(); len(bars) < n; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return append(bars, make([]int64, n-len(bars))...)
		}
		now := r.written.Load()
		bars, before = append(bars, now-before), now
	}
	return bars
}

func (r *rateMeter) stop() error {
	close(r.ending)
	err := <-r.ended
	if closeErr := r.file.Close(); err == nil {
		err = closeErr
	}
	return err
}
