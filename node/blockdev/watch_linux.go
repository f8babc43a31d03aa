package blockdev

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

// watched tells the keeper of a device that the kernel keeps itself when its server dies, with the requests that were
// under way, for ever. That the keeper cannot watch it is no error, the device works.
type watched struct {
	keeper *keeper.Client // nil = there is none
	name   string
	log    *slog.Logger
}

func watchedOf(s *site) watched { return watched{keeper: s.keeper, name: s.name, log: s.log} }

// begin says that this process serves the device.
func (w watched) begin(ctx context.Context, d keeper.Device) {
	if w.keeper == nil {
		return
	}
	err := whileInUse(ctx, func() error { return w.keeper.Watch(w.name, d) })
	if err != nil {
		w.log.Warn("no keeper ends the device should this process go and none follow", "number", d.Number, "err", err)
	}
}

// leave says that another process will.
func (w watched) leave() {
	if w.keeper == nil {
		return
	}
	if err := w.keeper.Release(w.name); err != nil { // it hears of our end in any case
		w.log.Debug("the keeper was not told that a device is left to the next process", "err", err)
	}
}

// forget says that there is nothing to watch any more.
func (w watched) forget() {
	if w.keeper == nil {
		return
	}
	if err := w.keeper.Drop(w.name, false); err != nil { // it finds out by itself
		w.log.Debug("the keeper was not told of the end of a device", "err", err)
	}
}

// tagOf names what is called name to the kernel or a keeper, in 8 bytes.
func tagOf(name string) uint64 {
	sum := sha256.Sum256([]byte(name))
	return binary.BigEndian.Uint64(sum[:])
}

// DeviceEnder implements keeper.Ender on the kernel of this machine. It takes root (CAP_SYS_ADMIN); for ublk /dev and
// io_uring, for nbd the machine's own network namespace, in which alone the kernel answers.
type DeviceEnder struct{}

var _ keeper.Ender = DeviceEnder{}

// Available implements keeper.Ender.
func (DeviceEnder) Available(kind keeper.DeviceKind) error {
	switch kind {
	case keeper.KindUblk:
		return ublkTransport{}.available()
	case keeper.KindNBD:
		return nbdTransport{}.available()
	}
	return fmt.Errorf("devices of kind %d: not in this build: %w", kind, trivet.ErrUnavailable)
}

// End implements keeper.Ender. What is left of the device the next server removes.
func (DeviceEnder) End(d keeper.Device) error {
	switch d.Kind {
	case keeper.KindUblk:
		return endUblk(d)
	case keeper.KindNBD:
		return endNBD(d)
	}
	return fmt.Errorf("devices of kind %d: not in this build: %w", d.Kind, trivet.ErrUnavailable)
}

func endUblk(d keeper.Device) error {
	c, err := dialUblk()
	if err != nil {
		return err
	}
	defer func() { _ = c.close() }() // nothing is under way
	info, err := c.info(d.Number)
	if errors.Is(err, trivet.ErrNotFound) {
		return nil
	}
	if err != nil || info.tag != d.Tag { // another's: ours is gone
		return err
	}
	return c.stop(d.Number)
}

func endNBD(d keeper.Device) error {
	backend, err := nbdBackend(int(d.Number))
	if err != nil || tagOf(backend) != d.Tag {
		return err
	}
	c, err := dialNBD()
	if err != nil {
		return err
	}
	defer c.close()
	return disconnectNBD(c, nbdState{Backend: backend, Index: int(d.Number)})
}
