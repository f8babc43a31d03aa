package blockdev

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

const (
	// nbdKernelFlags is what the kernel's client may send (include/uapi/linux/nbd.h: NBD_FLAG_*): HAS_FLAGS,
	// FLUSH, FUA, TRIM, WRITE_ZEROES (since 6.12), CAN_MULTI_CONN.
	nbdKernelFlags = 1<<0 | 1<<2 | 1<<3 | 1<<5 | 1<<6 | 1<<8

	// nbdRequeueEvery is how often the kernel looks at a request without an answer. One that went to a socket
	// which was replaced meanwhile it sends again: so it bounds the pause that requests under way see beyond
	// the absence of a server. One that waits in a live server it leaves alone, and logs.
	//
	// That holds for one socket and no NBD_ATTR_TIMEOUT only (nbd.c: nbd_xmit_timeout). With a timeout, or
	// with more sockets, the kernel cuts a connection whose server takes longer, and sends the request again
	// on another while the first copy may still be carried out, and land after a later write to the same
	// block (H39). A Device may take a minute, so there is one socket; our server works on 32 requests of
	// it at once.
	nbdRequeueEvery = 3 * time.Second

	// nbdGoneWait is how long a disconnected device may take to be free.
	nbdGoneWait = 10 * time.Second
)

// nbdTransport shows a Device by the kernel's NBD client, over a socket pair whose other end our NBD
// server serves. The handshake is left out: netlink tells the kernel size and flags. The device and
// the requests under way outlive the process. It needs root (CAP_SYS_ADMIN), nbd.ko, and a /sys that
// can be written.
type nbdTransport struct{}

// nbdState is what a record says of the transport.
type nbdState struct {
	// Backend is the identifier by which the kernel knows the attachment, and refuses others.
	Backend string `json:"backend"`
	// Index of /dev/nbdN; noNBD before it is known.
	Index int `json:"index"`
}

// nbdDev is a device of nbdTransport that this process serves.
type nbdDev struct {
	nbdState
	node    blockNode
	device  *mortal
	control nbdControl
	watch   watched
	log     *slog.Logger

	cancel   context.CancelFunc
	stopping atomic.Bool
	ended    chan struct{} // closed when nothing serves any more
	over     bool          // disconnected; of detach alone

	mu   sync.Mutex
	conn net.Conn // our end of the pair
}

// available asks the kernel for the netlink family.
func (nbdTransport) available() error {
	c, err := dialNBD()
	if err != nil {
		return err
	}
	c.close()
	return nil
}

// nbdBackendOf names an attachment to the kernel. Two servers of one machine, as tests have them, use
// different folders.
func nbdBackendOf(s *site) string { return "trivet:" + s.folder.path }

// kept is the device for the keeper.
func (st *nbdState) kept() keeper.Device {
	return keeper.Device{Kind: keeper.KindNBD, Number: uint32(st.Index), Tag: tagOf(st.Backend)}
}

func decodeNBDState(s *site, rec record) (nbdState, error) {
	var st nbdState
	if err := json.Unmarshal(rec.State, &st); err != nil {
		return st, fmt.Errorf("decode attachment record: %w: %w", err, trivet.ErrCorrupt)
	}
	if want := nbdBackendOf(s); st.Backend != want || st.Index < noNBD {
		return st, fmt.Errorf("attachment record of nbd%d, backend %q: want %q: %w",
			st.Index, st.Backend, want, trivet.ErrCorrupt)
	}
	return st, nil
}

// attach connects a free device.
func (nbdTransport) attach(ctx context.Context, s *site) (kernelDev, error) {
	st := nbdState{Backend: nbdBackendOf(s), Index: noNBD}
	if err := s.save(KindNBD, st); err != nil {
		return nil, err
	}
	c, err := dialNBD()
	if err != nil {
		return nil, err
	}
	ours, theirs, err := nbdPair()
	if err != nil {
		c.close()
		return nil, err
	}
	st.Index, err = c.connect([]int{theirs}, s.device.Size(), nbdKernelFlags, st.Backend,
		nbdDeadWait(s.keeper))
	_ = unix.Close(theirs) // the kernel has its own reference, and must not find ours when we are dead
	if err != nil {
		c.close()
		return nil, errors.Join(err, ours.Close())
	}
	d := newNBDDev(s, st, c)
	d.start(ctx, ours)
	if err := d.finish(s); err != nil { // whatever ctx says, leave nothing behind
		return nil, errors.Join(err, d.end())
	}
	d.watch.begin(ctx, d.kept())
	return d, nil
}

func newNBDDev(s *site, st nbdState, c nbdControl) *nbdDev {
	return &nbdDev{
		nbdState: st, device: &mortal{Device: s.device, log: s.log}, control: c, watch: watchedOf(s), log: s.log,
		ended: make(chan struct{}),
	}
}

// finish writes down the device, which is served already, and sets what netlink cannot. It does not open
// the device, which would read from it (decision 0007); pages of an earlier user of the number are
// dropped by the kernel at the disconnect (nbd.c: nbd_config_put), which H30 asks for.
func (d *nbdDev) finish(s *site) (err error) {
	if err := s.save(KindNBD, d.nbdState); err != nil {
		return err
	}
	if d.node, err = findBlockNode(fmt.Sprintf("nbd%d", d.Index)); err != nil {
		return err
	}
	return d.tune()
}

// tune sets the limits of the queue. The kernel would send up to 1280 KiB at once, our buffers hold
// requestBytesMax.
func (d *nbdDev) tune() error {
	return errors.Join(
		d.node.setQueue("max_sectors_kb", requestBytesMax>>10),
		d.node.setQueue("io_timeout", int(nbdRequeueEvery/time.Millisecond)),
	)
}

// nbdPair makes a pair of connected sockets: ours to serve, and a descriptor for the kernel. Neither is
// left open in programs that we start, which would keep a dead server's connection alive.
func nbdPair() (ours net.Conn, theirs int, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, -1, fmt.Errorf("make nbd sockets: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "nbd")
	ours, err = net.FileConn(f) // duplicates
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, -1, errors.Join(fmt.Errorf("make nbd sockets: %w", err), unix.Close(fds[1]))
	}
	return ours, fds[1], nil
}

// start serves conn, and its successors, until end or release.
func (d *nbdDev) start(ctx context.Context, conn net.Conn) {
	ctx, d.cancel = context.WithCancel(context.WithoutCancel(ctx)) // lives until detach
	d.conn = conn
	go func() {
		defer close(d.ended)
		d.run(ctx, conn)
	}()
}

// run serves the kernel. Should a connection end that nobody wanted to end, the kernel gets a new one:
// it sends again what had no answer.
func (d *nbdDev) run(ctx context.Context, conn net.Conn) {
	const pauseMin, pauseMax = 10 * time.Millisecond, time.Second
	for pause := pauseMin; ; pause = min(2*pause, pauseMax) {
		began := time.Now()
		err := serveKernelNBD(ctx, conn, d.device)
		_ = conn.Close() // may be closed already
		if d.stopping.Load() || ctx.Err() != nil {
			return
		}
		if time.Since(began) > pauseMax {
			pause = pauseMin
		}
		d.log.Warn("nbd connection of the kernel ended, making a new one", "nbd", d.Index, "err", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		if conn, err = d.reconnect(); err != nil {
			d.device.fail(fmt.Errorf("nbd%d cannot be served any more: %w", d.Index, err))
			return
		}
	}
}

// reconnect gives the kernel a new socket.
func (d *nbdDev) reconnect() (net.Conn, error) {
	ours, theirs, err := nbdPair()
	if err != nil {
		return nil, err
	}
	wait := nbdDeadWait(d.watch.keeper)
	err = errors.Join(d.control.reconnect(d.Index, d.Backend, []int{theirs}, wait), unix.Close(theirs))
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopping.Load() {
		err = errors.Join(err, trivet.ErrClosed)
	}
	if err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	d.conn = ours
	return ours, nil
}

// serveKernelNBD serves one connection without a handshake. It is the one place that knows how the
// server for other clients is started in its transmission phase.
func serveKernelNBD(ctx context.Context, conn net.Conn, dev trivet.Device) error {
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })() // ends reads and writes
	r := bufio.NewReaderSize(conn, nbdReaderBytes)
	c := newNBDConn(conn, r, &nbdExport{device: dev}, &nbdHandshake{mode: nbdSimple})
	var err error
	if c.pool, err = newBufPool(nbdSmallN, nbdLargeN); err != nil {
		return err
	}
	return errors.Join(c.serve(ctx), c.pool.close())
}

// resumable looks whether the kernel still has the device, under our name.
func (nbdTransport) resumable(_ context.Context, s *site, rec record) error {
	st, err := decodeNBDState(s, rec)
	if err != nil {
		return err
	}
	if st.Index, err = st.find(rec); err != nil {
		return err
	}
	if st.Index == noNBD {
		return fmt.Errorf("nbd device of %s: the kernel has none: %w", s.name, trivet.ErrNotFound)
	}
	c, err := dialNBD()
	if err != nil {
		return err
	}
	defer c.close()
	on, err := c.connected(st.Index)
	if err == nil && !on {
		err = fmt.Errorf("nbd%d is disconnected: %w", st.Index, trivet.ErrNotFound)
	}
	return err
}

// find returns the number of the device, noNBD if the kernel has none of this attachment.
func (st nbdState) find(rec record) (int, error) {
	if rec.BootID != bootID() {
		return noNBD, nil
	}
	if st.Index == noNBD {
		return findNBD(st.Backend)
	}
	got, err := nbdBackend(st.Index)
	if err != nil || got != st.Backend {
		return noNBD, err
	}
	return st.Index, nil
}

// resume gives the kernel a socket of this process in the place of the dead one's.
func (t nbdTransport) resume(ctx context.Context, s *site, rec record) (kernelDev, error) {
	if err := t.resumable(ctx, s, rec); err != nil {
		return nil, err
	}
	st, err := decodeNBDState(s, rec)
	if err != nil {
		return nil, err
	}
	if st.Index, err = st.find(rec); err != nil || st.Index == noNBD {
		return nil, errors.Join(err, fmt.Errorf("nbd device of %s is gone: %w", s.name, trivet.ErrNotFound))
	}
	c, err := dialNBD()
	if err != nil {
		return nil, err
	}
	d := newNBDDev(s, st, c)
	conn, err := d.reconnect()
	if err != nil {
		c.close()
		return nil, err
	}
	d.start(ctx, conn)
	// Only now, for both may wait for requests that are under way.
	err = d.finish(s)
	if err == nil {
		err = d.growIfNeeded()
	}
	if err != nil {
		return nil, errors.Join(err, d.release(ctx))
	}
	d.watch.begin(ctx, d.kept())
	return d, nil
}

func (d *nbdDev) path() string { return d.node.path() }

func (d *nbdDev) err() error { return d.device.err() }

func (d *nbdDev) grow(context.Context) error { return d.growIfNeeded() }

func (d *nbdDev) growIfNeeded() error {
	want := d.device.Size()
	got, err := d.node.sizeBytes()
	if err != nil || got >= want {
		return err
	}
	if err := d.control.resize(d.Index, d.Backend, want); err != nil {
		return err
	}
	if got, err = d.node.sizeBytes(); err != nil {
		return err
	}
	if got < want {
		return fmt.Errorf("device has %d bytes, nbd%d %d: %w", want, d.Index, got, trivet.ErrUnavailable)
	}
	d.log.Info("grown", "device", d.path(), "size", got)
	return d.tune()
}

func (d *nbdDev) survives() error { return nil }

// release closes the connection before it cancels what is under way, so that no request is answered with
// the error of its cancellation.
func (d *nbdDev) release(context.Context) error {
	d.stop()
	d.control.close()
	d.watch.leave()
	return nil
}

// stop ends the serving. It may be called again.
func (d *nbdDev) stop() {
	d.mu.Lock()
	d.stopping.Store(true)
	_ = d.conn.Close() // may be closed already
	d.mu.Unlock()
	d.cancel()
	<-d.ended
}

// end disconnects the device and stops serving it. It may be called again.
func (d *nbdDev) end() error {
	if d.over {
		return nil
	}
	d.stopping.Store(true) // the end of the connection is our own wish
	if err := disconnectNBD(d.control, d.nbdState); err != nil {
		d.stopping.Store(false)
		return err
	}
	d.stop()
	d.control.close()
	d.over = true
	return nil
}

// disconnectNBD disconnects the device if it still is the attachment's.
func disconnectNBD(c nbdControl, st nbdState) error {
	got, err := nbdBackend(st.Index)
	if err != nil || got != st.Backend {
		return err // gone; the number may be another's by now
	}
	return c.disconnect(st.Index)
}

func (d *nbdDev) detach(ctx context.Context) error {
	err := retry(ctx, busyPatience, func() (bool, error) {
		err := d.tryDetach(ctx)
		return errors.Is(err, trivet.ErrInUse), err
	})
	if err != nil {
		return err
	}
	d.watch.forget()
	return awaitNBDGone(ctx, d.nbdState)
}

// tryDetach writes back and disconnects, with the device open exclusively.
func (d *nbdDev) tryDetach(ctx context.Context) error {
	if d.over {
		return nil
	}
	if got, err := nbdBackend(d.Index); err != nil {
		return err
	} else if got != d.Backend {
		d.log.Warn("nbd device was disconnected by somebody else", "device", d.path())
		return d.end()
	}
	f, err := d.node.openUnused()
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // writeBack has the errors
	if err := d.node.writeBack(ctx, f, d.device); err != nil {
		if dead := d.err(); dead == nil {
			return err
		}
		d.log.Warn("unwritten data are lost with the attachment", "err", err)
	}
	return d.end()
}

// awaitNBDGone waits until the kernel has let go of the backend, which it does with the last close.
func awaitNBDGone(ctx context.Context, st nbdState) error {
	return retry(ctx, nbdGoneWait, func() (bool, error) {
		got, err := nbdBackend(st.Index)
		if err == nil && got == st.Backend {
			err = fmt.Errorf("nbd%d is still held by a user: %w", st.Index, trivet.ErrInUse)
		}
		return errors.Is(err, trivet.ErrInUse), err
	})
}

// abort disconnects the device of a dead process, which fails all that waits for it.
func (nbdTransport) abort(_ context.Context, s *site, rec record) error {
	st, err := decodeNBDState(s, rec)
	if err != nil {
		return err
	}
	if st.Index, err = st.find(rec); err != nil || st.Index == noNBD {
		return err
	}
	c, err := dialNBD()
	if err != nil {
		return err
	}
	defer c.close()
	return disconnectNBD(c, st)
}

// clean disconnects the device and unmounts what stands on it.
func (t nbdTransport) clean(ctx context.Context, s *site, rec record) error {
	if err := t.abort(ctx, s, rec); err != nil {
		return err
	}
	watchedOf(s).forget()
	st, err := decodeNBDState(s, rec)
	if err != nil {
		return err
	}
	// Somebody who still uses the device keeps its backend.
	if st.Index, err = st.find(rec); err != nil || st.Index == noNBD {
		return err
	}
	node, err := findBlockNode(fmt.Sprintf("nbd%d", st.Index))
	if err != nil {
		return err
	}
	if err := node.unmount(ctx, s.log); err != nil {
		return err
	}
	err = awaitNBDGone(ctx, st)
	if errors.Is(err, trivet.ErrInUse) { // a lazily unmounted filesystem that a pod still uses
		s.log.Warn("nbd device is still in use and goes with its last user", "device", node.path(), "err", err)
		return nil
	}
	return err
}
