package keeper

import (
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
)

// endRetry is when a device is tried to be ended again that could not be.
const endRetry = 10 * time.Second

// DeviceKind is a kind of device that the kernel itself keeps.
type DeviceKind uint32

// The kinds; they are on the wire.
const (
	KindUblk DeviceKind = 1
	KindNBD  DeviceKind = 2
)

// Device names a device for the watchdog that the kernel keeps itself when its server dies, with every request that
// was under way, for ever. There is nothing of it to keep; all that a keeper does is to end it once that has been long
// enough.
type Device struct {
	Kind   DeviceKind
	Number uint32 // of /dev/ublkbN or /dev/nbdN
	Tag    uint64 // of the attachment, by which a later device of that number is told from it
}

// The facts of a device on the wire are those of a connection, with another meaning, which an entry's flagDevice tells.
func (d Device) facts() Facts {
	return Facts{Minor: uint32(d.Kind), Connection: d.Number, Flags: uint32(d.Tag), Flags2: uint32(d.Tag >> 32)}
}

func deviceOf(f Facts) Device {
	return Device{Kind: DeviceKind(f.Minor), Number: f.Connection, Tag: uint64(f.Flags2)<<32 | uint64(f.Flags)}
}

// Ender ends devices, which package blockdev can.
type Ender interface {
	// Available returns why this process cannot end a device of that kind, or nil.
	Available(kind DeviceKind) error
	// End fails all requests of the device for good, if it is still the one with that tag. One that is gone is success.
	End(d Device) error
}

// watch makes s the server of a device, whose absence is counted from when it goes.
func (k *Keeper) watch(s *session, m *message) error {
	if k.ender == nil {
		return fmt.Errorf("watch %s: this keeper cannot end devices: %w", m.name, trivet.ErrUnavailable)
	}
	if err := k.ender.Available(deviceOf(m.facts).Kind); err != nil {
		return fmt.Errorf("watch %s: %w: %w", m.name, err, trivet.ErrUnavailable)
	}
	return k.put(s, m.name, entry{fd: -1, device: true, facts: m.facts})
}

// end ends a device without a server: all that waits for it gets an I/O error. It is tried until it works, a server is
// back, or the keeper is told to forget it. Other clients are not kept waiting by that.
func (k *Keeper) end(name string, e *entry) {
	k.mu.Lock()
	alone, d := k.entries[name] == e && !e.served, deviceOf(e.facts)
	k.mu.Unlock()
	if !alone {
		return
	}
	err := k.ender.End(d)
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.entries[name] != e || e.served:
	case err == nil:
		k.forgetLocked(name, e)
	default:
		k.log.Error("a device without a server could not be ended, trying again", "volume", name, "number", d.Number,
			"err", err)
		e.watch = time.AfterFunc(endRetry, func() { k.end(name, e) })
	}
}

// Watch tells the keeper that this process serves a device, and every later keeper until Release or Drop. Once it has
// had no server for the watchdog's time the keeper ends it. ErrUnavailable: there is no keeper at the moment, or one
// that cannot end such devices. ErrInUse: another server has the name.
func (c *Client) Watch(name string, d Device) error {
	return c.hold(name, hold{fd: -1, device: true, facts: d.facts()})
}

// Watchdog returns for how long the keeper lets a device be without a server. ErrUnavailable: there is no keeper.
func (c *Client) Watchdog() (time.Duration, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.connectLocked(); err != nil {
		return 0, err
	}
	a, _, err := c.listLocked()
	if err != nil {
		return 0, err
	}
	if a.away <= 0 { // an older keeper does not say
		return DefaultWatchdog, nil
	}
	return a.away, nil
}
