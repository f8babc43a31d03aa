package blockdev

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

const (
	// ublkDeathWait is how long the kernel may take to tear a dead server down: it first closes all its
	// descriptors. If every slot was in use it notices the death at the next look only, see ublkLookEvery.
	ublkDeathWait = 30 * time.Second

	// ublkLookEvery is how often the kernel looks at a request without an answer. One that waits in a live
	// server it leaves alone (ublk_drv.c: ublk_timeout).
	ublkLookEvery = 3 * time.Second

	// ublkGoneWait is how long a deleted device may take to be gone.
	ublkGoneWait = 10 * time.Second
)

// ublkTransport shows a Device by the kernel's driver for block devices in user space. The device and
// the requests under way outlive the process. It needs root (CAP_SYS_ADMIN), ublk_drv of Linux 6.5, and
// io_uring.
type ublkTransport struct{}

// ublkState is what a record says of the transport.
type ublkState struct {
	// Tag is kept by the driver with the device; by it we know that it is ours.
	Tag uint64 `json:"tag,string"`
	// Number of /dev/ublkbN; noUblk before it is known.
	Number int `json:"number"`
	// Size in bytes that the kernel was told.
	SizeBytes int64 `json:"sizeBytes"`
}

// ublkDev is a device of ublkTransport that this process serves.
type ublkDev struct {
	ublkState
	node   blockNode
	device *mortal
	server *ublkServer
	watch  watched
	log    *slog.Logger

	over bool // stopped; of detach alone
}

// available asks the driver what it can do.
func (ublkTransport) available() error {
	c, err := dialUblk()
	if err != nil {
		return err
	}
	return c.close()
}

// ublkTagOf names an attachment to the driver. Two servers of one machine, as tests have them, use
// different folders.
func ublkTagOf(s *site) uint64 { return tagOf("trivet:" + s.folder.path) }

func decodeUblkState(s *site, rec record) (ublkState, error) {
	var st ublkState
	if err := json.Unmarshal(rec.State, &st); err != nil {
		return st, fmt.Errorf("decode attachment record: %w: %w", err, trivet.ErrCorrupt)
	}
	if want := ublkTagOf(s); st.Tag != want || st.Number < noUblk {
		return st, fmt.Errorf("attachment record of ublk device %d, tag %x: want %x: %w",
			st.Number, st.Tag, want, trivet.ErrCorrupt)
	}
	return st, nil
}

// attach makes a device, serves it and starts it.
func (ublkTransport) attach(ctx context.Context, s *site) (kernelDev, error) {
	c, err := dialUblk()
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.close() }() // nothing is under way
	st := ublkState{Tag: ublkTagOf(s), Number: noUblk, SizeBytes: s.device.Size()}
	if err := s.save(KindUblk, st); err != nil {
		return nil, err
	}
	info := ublkInfo{
		queues: uint16(min(ublkQueuesMax, runtime.NumCPU())), depth: ublkDepth, requestBytesMax: requestBytesMax,
		device: ublkAnyNumber, pid: int32(os.Getpid()), flags: ublkFlags, tag: st.Tag,
	}
	if err := c.add(&info); err != nil {
		return nil, err
	}
	st.Number = int(info.device)
	d := newUblkDev(s, st)
	if err := d.open(ctx, s, c, &info); err != nil { // whatever ctx says, leave nothing behind
		return nil, errors.Join(err, d.end(c))
	}
	d.watch.begin(ctx, d.kept())
	return d, nil
}

func newUblkDev(s *site, st ublkState) *ublkDev {
	return &ublkDev{
		ublkState: st, device: &mortal{Device: s.device, log: s.log}, watch: watchedOf(s), log: s.log,
	}
}

// kept is the device for the keeper.
func (st *ublkState) kept() keeper.Device {
	return keeper.Device{Kind: keeper.KindUblk, Number: uint32(st.Number), Tag: st.Tag}
}

// open serves and starts a device that was added.
func (d *ublkDev) open(ctx context.Context, s *site, c *ublkControl, info *ublkInfo) (err error) {
	if err := s.save(KindUblk, d.ublkState); err != nil {
		return err
	}
	if info.flags&ublkFlags != ublkFlags {
		return fmt.Errorf("ublk device %d: flags %#x, want %#x: %w", d.Number, info.flags, ublkFlags, trivet.ErrUnavailable)
	}
	if err := c.setParams(info.device, d.SizeBytes); err != nil {
		return err
	}
	if d.server, err = newUblkServer(ctx, info.device, int(info.queues), d.device); err != nil {
		return err
	}
	if err := c.command(ublkStartDev, info.device, uint64(os.Getpid()), nil); err != nil {
		return fmt.Errorf("start ublk device %d: %w", d.Number, err)
	}
	return d.finish()
}

// finish sets what the driver cannot.
func (d *ublkDev) finish() (err error) {
	if d.node, err = findBlockNode(fmt.Sprintf("ublkb%d", d.Number)); err != nil {
		return err
	}
	return d.node.setQueue("io_timeout", int(ublkLookEvery/time.Millisecond))
}

// locate returns what the kernel knows of the device; ErrNotFound if it has none of this attachment.
func (st *ublkState) locate(c *ublkControl, rec record) (*ublkInfo, error) {
	gone := fmt.Errorf("ublk device of %s: the kernel has none: %w", rec.Name, trivet.ErrNotFound)
	if rec.BootID != bootID() {
		return nil, gone
	}
	if st.Number == noUblk {
		number, err := c.find(st.Tag)
		if err != nil {
			return nil, err
		}
		if number == noUblk {
			return nil, gone
		}
		st.Number = number
	}
	info, err := c.info(uint32(st.Number))
	if err == nil && info.tag != st.Tag { // the number is another's by now
		err = gone
	}
	return info, err
}

// resumable looks whether the kernel still has the device, with our tag, made to be taken over.
func (ublkTransport) resumable(_ context.Context, s *site, rec record) error {
	st, err := decodeUblkState(s, rec)
	if err != nil {
		return err
	}
	c, err := dialUblk()
	if err != nil {
		return err
	}
	defer func() { _ = c.close() }() // nothing is under way
	info, err := st.locate(c, rec)
	if err != nil {
		return err
	}
	if _, err := findBlockNode(fmt.Sprintf("ublkb%d", st.Number)); err != nil { // was never started, or was stopped
		return fmt.Errorf("ublk device %d: %w: %w", st.Number, err, trivet.ErrNotFound)
	}
	if info.flags&ublkFlags != ublkFlags || info.depth != ublkDepth || info.requestBytesMax != requestBytesMax {
		return fmt.Errorf("ublk device %d: flags %#x, %d slots of %d bytes: of another build: %w",
			st.Number, info.flags, info.depth, info.requestBytesMax, trivet.ErrUnavailable)
	}
	return nil
}

// resume takes the device over from its dead server.
func (t ublkTransport) resume(ctx context.Context, s *site, rec record) (kernelDev, error) {
	if err := t.resumable(ctx, s, rec); err != nil {
		return nil, err
	}
	st, err := decodeUblkState(s, rec)
	if err != nil {
		return nil, err
	}
	c, err := dialUblk()
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.close() }() // nothing is under way
	info, err := st.locate(c, rec)
	if err != nil {
		return nil, err
	}
	if err := startRecovery(ctx, c, info.device); err != nil {
		return nil, err
	}
	d := newUblkDev(s, st)
	if d.server, err = newUblkServer(ctx, info.device, int(info.queues), d.device); err != nil {
		return nil, err
	}
	err = c.command(ublkEndRecovery, info.device, uint64(os.Getpid()), nil)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("end recovery of ublk device %d: %w", d.Number, err), d.server.leave())
	}
	if err := errors.Join(s.save(KindUblk, d.ublkState), d.finish()); err != nil {
		return nil, errors.Join(err, d.server.leave())
	}
	d.watch.begin(ctx, d.kept())
	return d, nil
}

// startRecovery makes the driver forget the dead server. It may be called again after a recovery that
// was begun and not ended.
func startRecovery(ctx context.Context, c *ublkControl, device uint32) error {
	return retry(ctx, ublkDeathWait, func() (bool, error) {
		err := c.command(ublkStartRecovery, device, 0, nil)
		if errors.Is(err, unix.EINVAL) { // no queue has a server: begun already, if requests wait
			if info, infoErr := c.info(device); infoErr == nil && info.state == ublkStateQuiesced {
				return false, nil
			}
		}
		if err != nil {
			err = fmt.Errorf("start recovery of ublk device %d: %w", device, err)
		}
		return errors.Is(err, unix.EBUSY), err // the dead one is still being torn down
	})
}

func (d *ublkDev) path() string { return d.node.path() }

func (d *ublkDev) err() error { return d.device.err() }

// grow needs Linux 6.16: older drivers fix the size at the start. There it returns ErrInUse, which is
// errors.ErrUnsupported too: the volume takes its new size when it is attached anew.
func (d *ublkDev) grow(context.Context) error {
	want := d.device.Size()
	got, err := d.node.sizeBytes()
	if err != nil || got >= want {
		return err
	}
	c, err := dialUblk()
	if err != nil {
		return err
	}
	defer func() { _ = c.close() }() // nothing is under way
	features, err := c.features()
	if err != nil {
		return err
	}
	if features&ublkHasSize == 0 {
		return fmt.Errorf("%s has %d bytes, the volume %d: this kernel cannot resize a ublk device in use (Linux 6.16 can); "+
			"detach it first: %w: %w", d.path(), got, want, trivet.ErrInUse, errors.ErrUnsupported)
	}
	if err := c.command(ublkUpdateSize, uint32(d.Number), uint64(want/sectorBytes), nil); err != nil {
		return fmt.Errorf("resize %s to %d bytes: %w", d.path(), want, err)
	}
	d.log.Info("grown", "device", d.path(), "size", want)
	return nil
}

func (d *ublkDev) survives() error { return nil }

func (d *ublkDev) release(context.Context) error {
	err := d.server.leave()
	d.watch.leave()
	return err
}

func (d *ublkDev) detach(ctx context.Context) error {
	c, err := dialUblk()
	if err != nil {
		return err
	}
	defer func() { _ = c.close() }() // nothing is under way
	err = retry(ctx, busyPatience, func() (bool, error) {
		err := d.tryDetach(ctx, c)
		return errors.Is(err, trivet.ErrInUse), err
	})
	if err != nil {
		return err
	}
	d.watch.forget()
	return awaitUblkGone(ctx, c, d.ublkState)
}

// tryDetach writes back and stops, with the device open exclusively.
func (d *ublkDev) tryDetach(ctx context.Context, c *ublkControl) error {
	if d.over {
		return nil
	}
	f, err := d.node.openUnused()
	if errors.Is(err, unix.ENXIO) || errors.Is(err, os.ErrNotExist) {
		d.log.Warn("ublk device was stopped by somebody else", "device", d.path())
		return d.end(c)
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // writeBack has the errors
	if err := d.node.writeBack(ctx, f, d.device); err != nil {
		if d.err() == nil {
			return err
		}
		d.log.Warn("unwritten data are lost with the attachment", "err", err)
	}
	return d.end(c)
}

// end stops the device, which ends the server, and deletes it. It may be called again.
func (d *ublkDev) end(c *ublkControl) error {
	if d.over {
		return nil
	}
	if err := c.stop(uint32(d.Number)); err != nil {
		return err
	}
	if d.server != nil {
		if err := d.server.leave(); err != nil { // no request is left, and a device never started has live slots
			return err
		}
	}
	if err := c.remove(uint32(d.Number)); err != nil {
		return err
	}
	d.over = true
	return nil
}

// awaitUblkGone waits until the device is gone, which it is with its last close.
func awaitUblkGone(ctx context.Context, c *ublkControl, st ublkState) error {
	return retry(ctx, ublkGoneWait, func() (bool, error) {
		info, err := c.info(uint32(st.Number))
		if errors.Is(err, trivet.ErrNotFound) {
			return false, nil
		}
		if err == nil && info.tag == st.Tag {
			err = fmt.Errorf("ublk device %d is still held by a user: %w", st.Number, trivet.ErrInUse)
		}
		return errors.Is(err, trivet.ErrInUse), err
	})
}

// abort stops the device of a dead process, which fails all that waits for it.
func (ublkTransport) abort(_ context.Context, s *site, rec record) error {
	c, st, err := dialLeft(s, rec)
	if c == nil || err != nil {
		return err
	}
	defer func() { _ = c.close() }() // nothing is under way
	return c.stop(uint32(st.Number))
}

// dialLeft connects to the driver if the kernel has the device of a record. If not, it returns nil.
func dialLeft(s *site, rec record) (*ublkControl, ublkState, error) {
	st, err := decodeUblkState(s, rec)
	if err != nil || rec.BootID != bootID() {
		return nil, st, err
	}
	c, err := dialUblk()
	if err != nil {
		return nil, st, err
	}
	if _, err = st.locate(c, rec); err == nil {
		return c, st, nil
	}
	_ = c.close() // nothing is under way
	if errors.Is(err, trivet.ErrNotFound) {
		err = nil
	}
	return nil, st, err
}

// clean stops the device, unmounts what stands on it and deletes it.
func (t ublkTransport) clean(ctx context.Context, s *site, rec record) error {
	c, st, err := dialLeft(s, rec)
	if c == nil || err != nil {
		return err
	}
	defer func() { _ = c.close() }() // nothing is under way
	// Before it is stopped, with which its node goes: mounts are known by number.
	node, nodeErr := findBlockNode(fmt.Sprintf("ublkb%d", st.Number))
	if err := t.abort(ctx, s, rec); err != nil {
		return err
	}
	if nodeErr == nil {
		if err := node.unmount(ctx, s.log); err != nil {
			return err
		}
	} else if !errors.Is(nodeErr, os.ErrNotExist) { // absent: it was never started
		return nodeErr
	}
	if err := c.remove(uint32(st.Number)); err != nil {
		return err
	}
	watchedOf(s).forget()
	err = awaitUblkGone(ctx, c, st)
	if errors.Is(err, trivet.ErrInUse) { // a lazily unmounted filesystem that a pod still uses
		s.log.Warn("ublk device is still in use and goes with its last user", "device", st.Number, "err", err)
		return nil
	}
	return err
}
