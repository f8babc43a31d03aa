package blockdev

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

// notifyResend is FUSE_NOTIFY_RESEND (linux include/uapi/linux/fuse.h, from 6.9): the kernel queues
// again what a server has read and not answered, with bit 63 of the unique number set.
const notifyResend = 7

// errNoKeeper is why a device does not survive: the kernel ends the connection with its last
// descriptor, which is this process's.
var errNoKeeper = fmt.Errorf("fuse: no keeper has the connection: %w", trivet.ErrUnavailable)

// keep gives the connection to the keeper. That it cannot is no error: the device works, and dies with
// this process.
func (d *fuseDev) keep() {
	if d.keeper == nil {
		return
	}
	err := d.mayResend()
	if err == nil {
		err = d.keeper.Hold(d.name, d.server.replyFD, d.server.facts)
	}
	if err != nil {
		d.log.Warn("the device does not survive a restart of this process", "err", err)
	}
}

func (d *fuseDev) mayResend() error {
	if d.server.facts.Flags2&init2HasResend == 0 {
		return fmt.Errorf("fuse: the kernel cannot send requests again (it can from 6.9 on): %w", trivet.ErrUnavailable)
	}
	return nil
}

func (d *fuseDev) survives() error {
	if err := d.mayResend(); err != nil {
		return err
	}
	if d.keeper == nil || !d.keeper.Holds(d.name) {
		return errNoKeeper
	}
	return nil
}

// release ends the server only. Once it has begun it does not fail: there is no way back.
func (d *fuseDev) release(ctx context.Context) error {
	if err := d.survives(); err != nil {
		return err
	}
	if err := errors.Join(d.server.release(ctx), d.keeper.Release(d.name)); err != nil {
		d.log.Warn("released, but not cleanly", "err", err)
	}
	return nil
}

// resumable looks at what the kernel and the keeper say, without asking the file's server for
// anything.
func (fuseTransport) resumable(_ context.Context, s *site, rec record) error {
	st, err := decodeFuseState(rec, s.folder.file(deviceName))
	if err != nil {
		return err
	}
	if st.Loop == noLoop {
		return fmt.Errorf("fuse: there was no loop device yet: %w", trivet.ErrNotFound)
	}
	// "/" is what the kernel shows for a file whose mount is in a mount namespace that is gone: that of
	// the container in which it was made. resume looks closer.
	if file, err := backingFile(st.Loop); err != nil {
		return err
	} else if file != st.Point && file != "/" {
		return fmt.Errorf("fuse: loop%d has %q below it, not %s: %w", st.Loop, file, st.Point, trivet.ErrNotFound)
	}
	if s.keeper == nil {
		return errNoKeeper
	}
	entries, err := s.keeper.List()
	if err != nil {
		return err
	}
	for i := range entries {
		if entries[i].Name == s.name {
			return checkFacts(&entries[i].Facts)
		}
	}
	return fmt.Errorf("%w: %w", errNoKeeper, trivet.ErrClosed)
}

// checkFacts returns why this version cannot serve a connection that another one began, or nil.
func checkFacts(f *keeper.Facts) error {
	switch {
	case f.Flags2&init2HasResend == 0:
		return fmt.Errorf("fuse: the kernel cannot send requests again: %w", trivet.ErrUnavailable)
	case f.MaxWrite > requestBytesMax || f.Flags&^uint32(initWanted) != 0 || f.Flags2&^uint32(init2HasResend) != 0:
		return fmt.Errorf("fuse: the connection was begun with flags %#x, %#x and writes of %d bytes: %w",
			f.Flags, f.Flags2, f.MaxWrite, trivet.ErrUnavailable)
	}
	return nil
}

// resume takes the connection from the keeper and serves it. It sends no INIT: the kernel greets once.
func (fuseTransport) resume(ctx context.Context, s *site, rec record) (_ kernelDev, err error) {
	st, err := decodeFuseState(rec, s.folder.file(deviceName))
	if err != nil {
		return nil, err
	}
	d := newFuseDev(s)
	if d.loop, err = findLoop(st.Loop); err != nil {
		return nil, err
	}
	var fd int
	var facts keeper.Facts
	err = whileInUse(ctx, func() (err error) {
		fd, facts, err = s.keeper.Take(s.name)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(checkFacts(&facts), connected(fd), s.save(KindFUSE, st)); err != nil {
		return nil, errors.Join(err, unix.Close(fd), s.keeper.Release(s.name))
	}
	if d.server, err = newFuseServer(fd, s.device, s.buffers, s.log); err != nil {
		return nil, errors.Join(err, s.keeper.Release(s.name))
	}
	d.server.shared = s.shared
	if err := s.keeper.Hold(s.name, d.server.replyFD, facts); err != nil {
		return nil, errors.Join(err, d.server.stop(), s.keeper.Release(s.name))
	}
	if err := d.server.goOn(context.WithoutCancel(ctx), facts); err != nil {
		return nil, errors.Join(err, d.server.stop(), s.keeper.Release(s.name))
	}
	if err := d.checkLoop(); err != nil {
		return nil, errors.Join(err, d.server.release(ctx), s.keeper.Release(s.name))
	}
	return d, nil
}

// whileInUse calls try again for a while as long as it returns ErrInUse: the keeper hears of a server's
// death a moment after its locks are free.
func whileInUse(ctx context.Context, try func() error) error {
	return retry(ctx, busyPatience, func() (bool, error) {
		err := try()
		return errors.Is(err, trivet.ErrInUse), err
	})
}

// connected returns an error if the kernel has ended the connection.
func connected(fd int) error {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, 0); err != nil && err != unix.EINTR {
		return fmt.Errorf("poll fuse connection: %w", err)
	}
	if fds[0].Revents&unix.POLLERR != 0 {
		return fmt.Errorf("%w: %w", errAborted, trivet.ErrClosed)
	}
	return nil
}

// checkLoop finds out whether the loop device is ours, for which the file's server has to answer.
func (d *fuseDev) checkLoop() error {
	dev, err := os.Open(d.path())
	if err != nil {
		return fmt.Errorf("open loop device: %w", err)
	}
	defer func() { _ = dev.Close() }() // nothing was written
	own, err := ownLoop(dev, d.loop.number, loopTag(d.name), d.point)
	if err == nil && !own {
		err = fmt.Errorf("fuse: %s is not ours any more: %w", d.path(), trivet.ErrNotFound)
	}
	return err
}

// goOn serves a connection that another server has greeted the kernel on. The kernel is asked to send
// again what that one has read before anything is read here: asked later, it would send again what
// we have just read, too, and the first copy, whose answer the kernel does not know any more, could be carried out
// after a later write to the same block (H39). REQUIRES: not started.
func (s *fuseServer) goOn(ctx context.Context, facts keeper.Facts) error {
	s.facts = facts
	s.opensN.Store(1) // the loop device's
	close(s.inited)
	if err := s.resend(); err != nil {
		return err
	}
	s.start(ctx)
	return nil
}

// resend asks the kernel for all requests that were read and not answered.
func (s *fuseServer) resend() error {
	var b [fuseReplyBytes]byte
	binary.NativeEndian.PutUint32(b[:], fuseReplyBytes)
	binary.NativeEndian.PutUint32(b[4:], notifyResend)
	if _, err := unix.Write(s.replyFD, b[:]); err != nil {
		return fmt.Errorf("ask the kernel to send requests again: %w", err)
	}
	return nil
}

// mayRepeat counts a request that was sent again, and reports whether it is carried out. One that changes a device
// which another node writes too is not: the first copy may be in, and what that node has written since would be lost.
// Its outcome is unknown, which is what EIO says; that it cannot come any later the fence has seen to.
func (s *fuseServer) mayRepeat(r fuseRequest) bool {
	if s.shared && r.changes() {
		s.refused.Add(1)
		s.log.Warn("a write of the last process, not answered, is not repeated: another node may have written since",
			"opcode", r.op, "off", r.offBytes, "len", r.lenBytes)
		return false
	}
	s.repeated.Add(1)
	return true
}

func (d *fuseDev) resent() Resent {
	return Resent{Repeated: d.server.repeated.Load(), Refused: d.server.refused.Load()}
}

// release stops reading, waits for the requests under way as long as ctx lasts, and leaves the others
// unanswered. The connection goes on if another process has a descriptor of it.
func (s *fuseServer) release(ctx context.Context) (err error) {
	s.stopping.Store(true)
	s.leaving.Store(true)
	s.stopOnce.Do(func() {
		err = s.conn.Close() // the reader wakes
		select {
		case <-s.ended:
		case <-ctx.Done():
			s.muted.Store(true) // before the requests fail, for nobody may be told that they did
			s.cancel(trivet.ErrClosed)
			<-s.ended
		}
		s.cancel(trivet.ErrClosed)
		err = errors.Join(err, unix.Close(s.replyFD), s.pool.close())
	})
	return err
}
