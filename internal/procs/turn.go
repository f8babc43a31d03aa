package procs

import "time"

// turnMax is how long work in the background keeps a processor from threads that wait for it. On kernels that look only
// at each tick who is to run next, which come each 1 to 10 ms (CONFIG_HZ), that is otherwise a tick.
const turnMax = 200 * time.Microsecond

// letOthers has other threads that could run do so first; tests count it.
var letOthers = yield

// Turns lets work in the background give up the processor in between. It belongs to one goroutine. The zero value
// is ready.
type Turns struct{ began time.Time }

// Pass is to be called between pieces of work, each of some 50 µs. Once the goroutine has gone on for 200 µs, other
// threads that could run do so first. It costs a look at the clock. The caller must not hold a lock that a request may
// need.
func (t *Turns) Pass() {
	if time.Since(t.began) < turnMax {
		return
	}
	letOthers()
	t.began = time.Now()
}
