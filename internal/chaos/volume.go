package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	volumeBytes = 64 << 20
	blocksN     = 32 // of a volume that clients use; few, so that they meet

	attachWait = 15 * time.Second

	// Clients leave an attachment on which one request takes longer than its patience, which is drawn, so
	// that some attachments move while their server is only slow and others wait longer than the server.
	patienceMin = 3 * time.Second
	patienceMax = 14 * time.Second
)

// volume keeps one volume of the run attached somewhere by `trivet volume serve`, and moves it when its
// clients cannot go on. An attachment ends by force, while its server may be alive and its clients in mid-request.
type volume struct {
	index    int
	name     string
	lab      *lab
	history  *history
	sequence atomic.Uint64 // the last one given to a block

	mu       sync.Mutex
	current  *attachment   // nil while there is none
	changed  chan struct{} // closed when current changes
	attachN  int           // attachments that served
	failedN  int           // tries to attach that failed
	lastFail error
	lateN    int // requests of fenced attachments that were refused
}

// attachment is one period in which a volume is served somewhere.
type attachment struct {
	number   int // from 1
	node     *node
	socket   string
	patience time.Duration
	serve    *process    // trivet volume serve
	late     [2]*nbdConn // opened while it was good, used when it is fenced: one for reads, one for writes

	once sync.Once
	over chan struct{}
}

func newVolume(l *lab, h *history, index int) *volume {
	return &volume{
		index: index, name: fmt.Sprintf("vol%d", index+1), lab: l, history: h, changed: make(chan struct{}),
	}
}

// leave ends a as far as clients are concerned; the volume is attached anew.
func (a *attachment) leave() { a.once.Do(func() { close(a.over) }) }

func (v *volume) holder() *attachment {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.current
}

// failure returns why the last try to attach failed, if one did.
func (v *volume) failure() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.lastFail == nil {
		return errors.New("none failed")
	}
	return v.lastFail
}

func (v *volume) set(a *attachment) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.current = a
	close(v.changed)
	v.changed = make(chan struct{})
}

// await returns the attachment, waiting until there is one newer than the given number; nil when ctx ends.
func (v *volume) await(ctx context.Context, than int) *attachment {
	for {
		v.mu.Lock()
		a, changed := v.current, v.changed
		v.mu.Unlock()
		if a != nil && a.number > than {
			return a
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// keep attaches the volume, and again whenever that ends, until ctx ends. It returns once everything that it
// started has ended.
func (v *volume) keep(ctx context.Context, rng *rand.Rand) {
	var wg sync.WaitGroup
	defer wg.Wait()
	log := v.openLog("attach")
	defer log.Close()
	var last *node
	for number := 1; ctx.Err() == nil; {
		a, err := v.attach(ctx, rng, number, last)
		if err != nil {
			v.mu.Lock()
			v.failedN, v.lastFail = v.failedN+1, err
			fmt.Fprintf(log, "%8.3f s  %v\n", time.Duration(v.history.now()).Seconds(), err)
			v.mu.Unlock()
			if pause(ctx, 300*time.Millisecond) != nil {
				return
			}
			continue
		}
		number, last = number+1, a.node
		v.history.attached(v.index, a.number)
		fmt.Fprintf(log, "%8.3f s  attachment %d serves on %s\n", time.Duration(v.history.now()).Seconds(), number-1,
			last.name)
		v.mu.Lock()
		v.attachN++
		v.mu.Unlock()
		v.set(a)
		select {
		case <-ctx.Done():
		case <-a.over:
		case <-a.serve.exited:
		}
		a.leave()
		v.set(nil)
		late := rand.New(rand.NewPCG(rng.Uint64(), 0)) //nolint:gosec // repeats with the seed
		wg.Go(func() {
			v.watchFenced(ctx, a, late)
			a.serve.end(syscall.SIGTERM, time.Second)
		})
	}
}

// openLog opens a log of the volume in the folder of the run, or discards what is written.
func (v *volume) openLog(name string) *os.File {
	path := filepath.Join(v.lab.dir, v.name+"-"+name+".log")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		v.history.violation("the log of the run cannot be written: " + err.Error())
		return os.NewFile(^uintptr(0), path) // every write to it fails
	}
	return f
}

// attach fences whoever had the volume and serves it from a node drawn among those that run.
func (v *volume) attach(ctx context.Context, rng *rand.Rand, number int, last *node) (_ *attachment, err error) {
	var up []*node
	for _, n := range v.lab.nodes {
		if n.up() {
			up = append(up, n)
		}
	}
	if len(up) == 0 {
		return nil, errors.New("no server runs")
	}
	n, by := up[rng.IntN(len(up))], up[rng.IntN(len(up))]
	if by == last { // the old holder, if it is alive, must not get a chance to say goodbye
		by = n
	}
	if err := v.lab.ask(ctx, by, attachWait, nil, "volume", "detach", v.name, "--force"); err != nil {
		return nil, err
	}
	a := &attachment{
		number: number, node: n, over: make(chan struct{}), patience: between(rng, patienceMin, patienceMax),
		socket: filepath.Join(n.home, fmt.Sprintf("v%d-%d-%d.sock", v.index+1, number, rng.IntN(1e6))),
	}
	log := v.openLog("serve")
	defer log.Close() // the process has its own descriptor
	line := v.lab.cli(n, attachWait, "volume", "serve", v.name, "--socket", a.socket)
	cmd := exec.Command(line[0], line[1:]...) //nolint:noctx // ended by keep, or by lab.close
	cmd.Stdout, cmd.Stderr = log, log
	if a.serve, err = v.lab.procs.start(cmd); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, attachWait)
	defer cancel()
	err = until(ctx, v.name+" is served on "+n.name, func() (done bool, err error) {
		if !a.serve.running() {
			cancel()
		}
		a.late[0], err = dialNBD(ctx, a.socket)
		return err == nil, err
	})
	if err == nil {
		if a.late[1], err = dialNBD(ctx, a.socket); err != nil {
			a.late[0].close()
		}
	}
	if err != nil {
		a.serve.end(syscall.SIGTERM, time.Second)
		return nil, err
	}
	return a, nil
}

// wait is how long a request may take. A late one waits for a server that is paused, since it is served in the
// very moment in which that goes on.
func (a *attachment) wait(late bool) time.Duration {
	const lateWait = 20 * time.Second
	if late {
		return lateWait
	}
	return a.patience
}

// watchFenced goes on using a fenced attachment once a later one is served: everything must be refused, reads
// too (H12). It ends when the old server's connections do, or after some tries.
func (v *volume) watchFenced(ctx context.Context, a *attachment, rng *rand.Rand) {
	var wg sync.WaitGroup
	defer wg.Wait()
	served := v.await(ctx, a.number) != nil
	for i, conn := range a.late {
		if !served {
			conn.close()
			continue
		}
		c := &client{id: lateClient + i, volume: v, rng: rand.New(rand.NewPCG(rng.Uint64(), 1))} //nolint:gosec // as above
		do := c.read
		if i > 0 {
			do = c.write
		}
		wg.Go(func() {
			defer context.AfterFunc(ctx, conn.close)() // ends a request that waits
			defer conn.close()
			v.useLate(ctx, func() error {
				lba, n := c.draw()
				return do(conn, a, lba, n, true)
			})
		})
	}
}

// useLate does one kind of request at a fenced attachment a few times.
func (v *volume) useLate(ctx context.Context, do func() error) {
	const triesN = 5
	for range triesN {
		err := do()
		var refused nbdError
		if err != nil && !errors.As(err, &refused) {
			return
		}
		if err != nil {
			v.mu.Lock()
			v.lateN++
			v.mu.Unlock()
		}
		if pause(ctx, 300*time.Millisecond) != nil {
			return
		}
	}
}
