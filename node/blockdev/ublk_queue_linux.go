package blockdev

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

const (
	ublkFetch  = 3<<30 | 16<<16 | 'u'<<8 | 0x20 // UBLK_U_IO_FETCH_REQ
	ublkCommit = 3<<30 | 16<<16 | 'u'<<8 | 0x21 // UBLK_U_IO_COMMIT_AND_FETCH_REQ

	ublkOpRead        = 0
	ublkOpWrite       = 1
	ublkOpFlush       = 2
	ublkOpDiscard     = 3
	ublkOpWriteZeroes = 5
	ublkOpMask        = 0xff
	ublkFUA           = 1 << 13

	// ublkQueuesMax queues have a thread each. The thread only passes requests on, so two keep more cores
	// busy than a volume should have.
	ublkQueuesMax = 2

	// ublkDepth requests of a queue may be under way.
	ublkDepth = 64

	// ublkWorkersN requests of all queues may wait in the Device at once.
	ublkWorkersN = 64

	ublkSmallN = ublkWorkersN
	ublkLargeN = 12

	ublkDescBytes = 24        // struct ublksrv_io_desc
	ublkDescStep  = 4096 * 24 // of one queue's descriptors to the next's: for UBLK_MAX_QUEUE_DEPTH of them

	// Where the data of a request are in ublkcN: a base, the queue from bit 41 and the tag from bit 25 on.
	ublkDataBase = 0x80000000
	ublkQueueBit = 41
	ublkTagBit   = 25

	// ublkThreadWait is how long a thread may take from the end of its work to its own.
	ublkThreadWait = 10 * time.Second

	ublkWake = 1 << 32 // user data of the wake-up; others are tags
)

// ublkServer serves a device: a thread for each queue takes requests from the kernel, a fixed number
// of workers carries them out, and the thread that fetched a request hands in its answer, as the driver
// demands. Nothing is allocated per request.
type ublkServer struct {
	number uint32
	fd     int // /dev/ublkcN
	device *mortal
	pool   *bufPool
	queues []*ublkQueue
	tasks  chan ublkTask
	cancel context.CancelFunc

	threads, workers sync.WaitGroup
	stopOnce         sync.Once
	leaving          atomic.Bool // end the threads, whatever is under way
}

// ublkTask is a request on its way to a worker.
type ublkTask struct {
	queue *ublkQueue
	tag   uint16
}

// ublkDone is an answer on its way to the queue's thread.
type ublkDone struct {
	tag    uint16
	result int32
}

// ublkQueue is one queue of the device. Its ring belongs to its thread.
type ublkQueue struct {
	id     uint16
	server *ublkServer
	descs  []byte // what the kernel asks for, by tag; mapped, read only
	ring   *uring
	tid    int       // of the thread
	wakeFD int       // an eventfd, by which workers wake the thread
	wakeN  [1]uint64 // what is read from it

	asleep atomic.Bool // the thread is in the kernel, or about to go there

	mu    sync.Mutex
	done  []ublkDone // at most ublkDepth
	spare []ublkDone // the thread's
}

// newUblkServer opens the device's character node and starts to serve: when it returns every request slot
// of every queue has been offered to the kernel.
func newUblkServer(ctx context.Context, number uint32, queuesN int, device *mortal) (*ublkServer, error) {
	fd, err := unix.Open(fmt.Sprintf("/dev/ublkc%d", number), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open ublk device %d: %w", number, err)
	}
	s := &ublkServer{number: number, fd: fd, device: device, tasks: make(chan ublkTask, queuesN*ublkDepth)}
	ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx)) // lives until detach
	if s.pool, err = newBufPool(ublkSmallN, ublkLargeN); err != nil {
		s.cancel()
		return nil, errors.Join(err, unix.Close(fd))
	}
	for range ublkWorkersN {
		s.workers.Go(func() {
			for t := range s.tasks {
				t.queue.finish(t.tag, s.serve(ctx, t))
			}
		})
	}
	for id := range queuesN {
		if err = s.startQueue(uint16(id)); err != nil {
			return nil, errors.Join(err, s.leave())
		}
	}
	return s, nil
}

// startQueue opens a queue and waits until its thread has offered all its slots.
func (s *ublkServer) startQueue(id uint16) error {
	q := &ublkQueue{
		id: id, server: s, wakeFD: -1, done: make([]ublkDone, 0, ublkDepth), spare: make([]ublkDone, 0, ublkDepth),
	}
	pageSize := unix.Getpagesize()
	n := (ublkDepth*ublkDescBytes + pageSize - 1) / pageSize * pageSize
	var err error
	q.descs, err = unix.Mmap(s.fd, int64(id)*ublkDescStep, n, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map ublk queue %d: %w", id, err)
	}
	s.queues = append(s.queues, q) // leave frees it
	if q.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return fmt.Errorf("make ublk queue %d: %w", id, err)
	}
	ready := make(chan error, 1)
	s.threads.Go(func() { onOwnThread(func() { q.run(ready) }) })
	return <-ready
}

// onOwnThread runs f on a thread that ends with it: to the driver that end is the death of the queue's
// server. The main thread never ends, so it is not taken.
func onOwnThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f()
		return // still locked: the runtime ends the thread
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // cannot be the main thread: that one is ours
		f()
	}()
	<-done
	runtime.UnlockOSThread()
}

// run is the queue's thread.
func (q *ublkQueue) run(ready chan<- error) {
	q.tid = unix.Gettid()
	var err error
	if q.ring, err = openUring(2*ublkDepth, 0); err != nil {
		ready <- err
		return
	}
	defer func() { _ = q.ring.close() }() // the kernel takes back what is under way
	for tag := range ublkDepth {
		q.putIO(ublkFetch, uint16(tag), 0)
	}
	q.armWake()
	if err := q.ring.enter(0); err != nil {
		ready <- err
		return
	}
	liveN := ublkDepth
	if failed, err := q.reap(); err != nil || failed > 0 {
		ready <- errors.Join(err, fmt.Errorf("ublk queue %d: the kernel refuses to be served: %w", q.id, trivet.ErrInUse))
		return
	}
	ready <- nil
	for liveN > 0 {
		q.commit()
		q.asleep.Store(true)
		if !q.idle() {
			q.asleep.Store(false)
			continue
		}
		if q.server.leaving.Load() {
			return
		}
		err := q.ring.enter(1)
		q.asleep.Store(false)
		if err != nil {
			q.server.device.fail(fmt.Errorf("ublk queue %d: %w", q.id, err))
			return
		}
		failed, err := q.reap()
		liveN -= failed
		if err != nil {
			q.server.device.fail(fmt.Errorf("ublk queue %d: %w", q.id, err))
		}
	}
}

// idle tells whether no answer waits to be handed in.
func (q *ublkQueue) idle() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.done) == 0
}

// finish gives an answer to the thread and wakes it if it sleeps.
func (q *ublkQueue) finish(tag uint16, result int32) {
	q.mu.Lock()
	q.done = append(q.done, ublkDone{tag, result})
	q.mu.Unlock()
	q.wake()
}

func (q *ublkQueue) wake() {
	if q.asleep.CompareAndSwap(true, false) {
		var one [8]byte
		binary.NativeEndian.PutUint64(one[:], 1)
		_, _ = unix.Write(q.wakeFD, one[:]) // cannot fail: the counter is far from full
	}
}

// commit hands in what the workers have finished.
func (q *ublkQueue) commit() {
	q.mu.Lock()
	q.done, q.spare = q.spare[:0], q.done
	q.mu.Unlock()
	for _, d := range q.spare {
		q.putIO(ublkCommit, d.tag, d.result)
	}
}

// putIO pushes a command with a slot. The ring has room for all slots at once and a wake-up.
func (q *ublkQueue) putIO(op uint32, tag uint16, result int32) {
	sqe := q.push()
	putCmd(sqe, q.server.fd, op, uint64(tag))
	cmd := (*ublkIOCmd)(unsafe.Pointer(&sqe[uringCmdOffset]))
	cmd.queue, cmd.tag, cmd.result = q.id, tag, result // no address: UBLK_F_USER_COPY
}

// ublkIOCmd is struct ublksrv_io_cmd.
type ublkIOCmd struct {
	queue, tag uint16
	result     int32
	addr       uint64
}

func (q *ublkQueue) armWake() {
	putRead(q.push(), q.wakeFD, unsafe.Pointer(&q.wakeN), 8, ublkWake)
}

func (q *ublkQueue) push() []byte {
	for {
		if sqe := q.ring.push(); sqe != nil {
			return sqe
		}
		// Never so far: there are fewer commands than entries. Were it wrong, this makes room.
		_ = q.ring.enter(0)
	}
}

// reap takes what the kernel has for us: requests, which go to the workers, and slots that the kernel
// gives back, which it counts. An error says that a slot is lost other than by the end of the device.
func (q *ublkQueue) reap() (lostN int, err error) {
	for {
		data, result, ok := q.ring.pop()
		switch {
		case !ok:
			return lostN, err
		case data == ublkWake:
			q.armWake()
		case result == 0:
			q.server.tasks <- ublkTask{q, uint16(data)} // has room for all slots
		default:
			lostN++
			if result != -int32(unix.ENODEV) { // UBLK_IO_RES_ABORT
				err = fmt.Errorf("slot %d: %w", data, unix.Errno(-result))
			}
		}
	}
}

// serve carries out a request and returns what the driver wants to know: bytes, or an errno below zero.
func (s *ublkServer) serve(ctx context.Context, t ublkTask) int32 {
	at := int(t.tag) * ublkDescBytes
	desc := t.queue.descs[at : at+ublkDescBytes]
	flags := *(*uint32)(unsafe.Pointer(&desc[0]))
	n := int64(*(*uint32)(unsafe.Pointer(&desc[4]))) * sectorBytes
	off := int64(*(*uint64)(unsafe.Pointer(&desc[8]))) * sectorBytes

	done, err := s.do(ctx, t, flags, off, n)
	if err == nil && flags&ublkFUA != 0 {
		err = s.device.Flush(ctx)
	}
	if err != nil {
		s.device.log.Debug("request failed", "opcode", flags&ublkOpMask, "off", off, "len", n, "err", err)
		return -int32(toErrno(err))
	}
	return done
}

func (s *ublkServer) do(ctx context.Context, t ublkTask, flags uint32, off, n int64) (int32, error) {
	switch flags & ublkOpMask {
	case ublkOpRead:
		buf, err := s.pool.get(ctx, n)
		if err != nil {
			return 0, err
		}
		defer s.pool.put(buf)
		if err := s.device.ReadAt(ctx, buf.payload(n), off); err != nil {
			return 0, err
		}
		return int32(n), s.copyAll(unix.Pwrite, buf.payload(n), t)
	case ublkOpWrite:
		buf, err := s.pool.get(ctx, n)
		if err != nil {
			return 0, err
		}
		defer s.pool.put(buf)
		if err := s.copyAll(unix.Pread, buf.payload(n), t); err != nil {
			return 0, err
		}
		return int32(n), s.device.WriteAt(ctx, buf.payload(n), off)
	case ublkOpFlush:
		return 0, s.device.Flush(ctx)
	case ublkOpDiscard:
		return 0, s.device.Discard(ctx, off, n)
	case ublkOpWriteZeroes:
		return 0, s.device.WriteZeroes(ctx, off, n)
	}
	return 0, fmt.Errorf("ublk opcode %d: %w", flags&ublkOpMask, trivet.ErrInvalid)
}

// copyAll copies the data of a request to or from the kernel's pages, by pread or pwrite.
func (s *ublkServer) copyAll(by func(int, []byte, int64) (int, error), b []byte, t ublkTask) error {
	at := int64(ublkDataBase) | int64(t.queue.id)<<ublkQueueBit | int64(t.tag)<<ublkTagBit
	for len(b) > 0 {
		n, err := by(s.fd, b, at)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = trivet.ErrCorrupt
		}
		if err != nil {
			return fmt.Errorf("copy data of a ublk request: %w", err)
		}
		b, at = b[n:], at+int64(n)
	}
	return nil
}

// join waits for the threads, which end when the device was stopped, and frees everything. Further calls
// do nothing.
func (s *ublkServer) join() (err error) {
	s.stopOnce.Do(func() {
		s.threads.Wait()
		s.cancel()
		close(s.tasks)
		s.workers.Wait()
		errs := []error{s.pool.close()}
		for _, q := range s.queues {
			errs = append(errs, awaitThread(q.tid), unix.Munmap(q.descs))
			if q.wakeFD >= 0 {
				errs = append(errs, unix.Close(q.wakeFD))
			}
		}
		err = errors.Join(append(errs, unix.Close(s.fd))...)
	})
	return err
}

// awaitThread waits until a thread of this process, which is about to end, has ended: only then does the
// driver take another server without a complaint (ublk_drv.c: ublk_queue_reinit).
func awaitThread(tid int) error {
	return retry(context.Background(), ublkThreadWait, func() (bool, error) {
		if gone := tid == 0 || unix.Tgkill(unix.Getpid(), tid, 0) != nil; gone {
			return false, nil
		}
		return true, fmt.Errorf("thread %d of a ublk queue does not end: %w", tid, trivet.ErrUnavailable)
	})
}

// leave ends the threads although the device lives: to the driver their server has died, and it keeps
// what is under way for the next one.
func (s *ublkServer) leave() error {
	s.leaving.Store(true)
	for _, q := range s.queues {
		q.wake()
	}
	return s.join()
}
