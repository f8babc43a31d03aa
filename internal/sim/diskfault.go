package sim

import (
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// diskFaults is how a disk misbehaves. Its fields are under disk.mu.
type diskFaults struct {
	released  bool          // the machine is dead: nothing of this counts any more
	failIn    int           // operations until one fails with failWith; 0 = never
	failWith  syscall.Errno //
	full      bool          // every operation that needs room fails with ENOSPC
	injected  int           // errors that were returned, and stalls
	latency   time.Duration // mean of a flush of the log; 0 = none
	rnd       *rand.Rand    // of the latency
	stalledTo time.Time     // flushes of the log hang until then
	resume    chan struct{} // closed when the machine is dead
}

// drawLocked returns the error of one operation.
//
// The manifest of Pebble and what points to it are left alone: the engine must not return to Pebble
// from such an error and ends the process, from inside Pebble and with its locks held, which within
// one process leaves goroutines that never end. A crash at the same operation does the same to the disk.
func (f *diskFaults) drawLocked(name string, grows bool) error {
	if f.released || isManifest(name) {
		return nil
	}
	if f.full && grows {
		f.injected++
		return fmt.Errorf("injected: %s: %w", name, syscall.ENOSPC)
	}
	if f.failIn > 0 {
		if f.failIn--; f.failIn == 0 {
			f.injected++
			return fmt.Errorf("injected: %s: %w", name, f.failWith)
		}
	}
	return nil
}

func isManifest(name string) bool {
	b := path.Base(name)
	return strings.HasPrefix(b, "MANIFEST") || strings.HasPrefix(b, "marker.") || strings.HasPrefix(b, "CURRENT") ||
		b == "engine"
}

func isLog(name string) bool { return strings.HasPrefix(name, logDir+"/") }

// fail makes the n-th operation from now fail, once.
func (d *disk) fail(n int, with syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults.failIn, d.faults.failWith = n, with
}

// fill takes all room from the disk, or gives it back.
func (d *disk) fill(full bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults.full = full
}

// stallExcuse is the stall after which a machine may stop itself: raftgroup does so after 10 s, and one
// stall may follow another.
const stallExcuse = 8 * time.Second

// stall lets flushes of the log hang for a time.
func (d *disk) stall(t time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults.stalledTo = time.Now().Add(t)
	if t >= stallExcuse {
		d.faults.injected++
	}
}

// setLatency makes flushes of the log take a time of the given mean.
func (d *disk) setLatency(mean time.Duration, rnd *rand.Rand) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults.latency, d.faults.rnd = mean, rnd
}

// wasFaulty reports whether the disk has given its machine a reason to stop.
func (d *disk) wasFaulty() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.faults.injected > 0
}

// release ends all faults, for a machine that is dead or stops: what is left of it must be able to end.
func (d *disk) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.faults.released {
		d.faults.released = true
		close(d.faults.resume)
	}
}

// heal ends all faults but slow flushes.
func (d *disk) heal() {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := &d.faults
	f.failIn, f.full, f.stalledTo = 0, false, time.Time{}
	if !f.released {
		close(f.resume)
		f.resume = make(chan struct{})
	}
}

// slow waits for as long as a flush of the log takes.
//
// A bubble's clock stands still while a goroutine waits for a mutex, so a wait with a lock held on
// which another goroutine waits would never end. Hence only flushes of the log are slow, over which
// nobody holds one.
func (d *disk) slow() {
	d.mu.Lock()
	f := &d.faults
	var t time.Duration
	if f.latency > 0 {
		t = time.Duration(min(f.rnd.ExpFloat64(), 10) * float64(f.latency))
	}
	t = max(t, time.Until(f.stalledTo))
	resume := f.resume
	if f.released || t <= 0 {
		d.mu.Unlock()
		return
	}
	d.mu.Unlock()
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-resume:
	}
}

// flipBit changes one bit of one file below dir, of a machine that is down. Files are drawn by their
// size. It returns what it changed, "" when there is nothing. Of the log's files, which are mostly space that
// was never written, it takes what is not zero.
func flipBit(fs *vfs.MemFS, dir string, rnd *rand.Rand) (string, error) {
	type target struct {
		name string
		size int64
	}
	var files []target
	var sum int64
	dirs := []string{dir}
	for len(dirs) > 0 {
		d := dirs[0]
		dirs = dirs[1:]
		names, err := fs.List(d)
		slices.Sort(names)
		if err != nil {
			return "", err
		}
		for _, name := range names {
			full := fs.PathJoin(d, name)
			st, err := fs.Stat(full)
			switch {
			case err != nil:
				return "", err
			case st.IsDir():
				dirs = append(dirs, full)
			case st.Size() > 0:
				files = append(files, target{full, st.Size()})
				sum += st.Size()
			}
		}
	}
	if sum == 0 {
		return "", nil
	}
	at := rnd.Int64N(sum)
	var err error
	for _, t := range files {
		if at < t.size {
			if isLog(t.name) {
				if at, err = written(fs, t.name, at); err != nil || at < 0 {
					return "", err
				}
			}
			return fmt.Sprintf("%s at %d of %d", t.name, at, t.size), flipAt(fs, t.name, at, byte(1)<<rnd.IntN(8))
		}
		at -= t.size
	}
	return "", nil
}

// written returns the first byte at or after an offset, the file taken for a ring, that is not zero; -1 when
// all are.
func written(fs *vfs.MemFS, name string, from int64) (int64, error) {
	b, err := contents(fs, name)
	if err != nil {
		return 0, err
	}
	for i := range int64(len(b)) {
		if at := (from + i) % int64(len(b)); b[at] != 0 {
			return at, nil
		}
	}
	return -1, nil
}

func flipAt(fs *vfs.MemFS, name string, at int64, bit byte) error {
	f, err := fs.OpenReadWrite(name, vfs.WriteCategoryUnspecified)
	if err != nil {
		return fmt.Errorf("rot: %w", err)
	}
	defer func() { _ = f.Close() }() // memory
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		return fmt.Errorf("rot in %s: %w", name, err)
	}
	b[0] ^= bit
	if _, err := f.WriteAt(b[:], at); err != nil {
		return fmt.Errorf("rot in %s: %w", name, err)
	}
	return f.Sync()
}
