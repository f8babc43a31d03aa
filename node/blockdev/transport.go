package blockdev

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

// Kind names a way of showing a Device as a block device of the kernel. The zero value is KindAuto.
type Kind string

// The kinds. Not every one is in every build or on every machine: see Attach.
const (
	KindAuto Kind = "auto" // the first of the others, in this order, that the machine has
	KindUblk Kind = "ublk" // ublk_drv, /dev/ublkbN
	KindNBD  Kind = "nbd"  // nbd.ko over netlink, /dev/nbdN
	KindFUSE Kind = "fuse" // a FUSE file with a loop device on top, /dev/loopN
)

// preference is what KindAuto tries, the best first. KindUblk has to be asked for until it has run for
// longer, and cannot grow before Linux 6.16 (docs/decisions/0019).
var preference = []Kind{KindNBD, KindFUSE}

// preferenceShared is preference for a device that two nodes may write: one whose kind tells what is sent again
// outlives its process (docs/decisions/0037).
var preferenceShared = []Kind{KindFUSE, KindNBD}

// transportOf returns the transport of a kind, nil if this build has none. It is the one place where
// a transport is entered.
func transportOf(k Kind) transport {
	switch k {
	case KindFUSE:
		return fuseTransport{}
	case KindNBD:
		return nbdTransport{}
	case KindUblk:
		return ublkTransport{}
	case KindAuto:
	}
	return nil
}

// transport makes block devices of one kind. Its methods keep nothing between calls: what has to be
// known later, by another process, is in the site's record. All of them run with the site's folder
// locked, so one at a time on an attachment.
type transport interface {
	// available returns why the machine cannot do it, wrapping ErrUnavailable, or nil.
	available() error

	// attach shows s.device. It saves a record before each deed that clean would have to undo. On error
	// it has undone everything but the folder.
	attach(ctx context.Context, s *site) (kernelDev, error)

	// resumable returns why nobody can go on with what rec says, or nil. It asks nothing that could
	// wait for the dead server.
	resumable(ctx context.Context, s *site, rec record) error

	// resume serves the device of rec, whose process is dead or has released it, with s.device. What
	// uses the device sees a pause. On error the device is as before, for another try or for clean.
	resume(ctx context.Context, s *site, rec record) (kernelDev, error)

	// clean removes the device of rec, whose process is dead, with all that stands on it in this mount
	// namespace. Nothing to remove is no error.
	clean(ctx context.Context, s *site, rec record) error
}

// aborter is a transport whose device may wait for a server that is away. abort makes every request on
// the device of rec fail, at once and for good.
type aborter interface {
	abort(ctx context.Context, s *site, rec record) error
}

// teller is a kernelDev that can tell which requests the kernel sends again, after an earlier process had read and not
// answered them.
type teller interface {
	resent() Resent
}

// Resent counts the requests that an earlier process had read and not answered, and that this one got again.
type Resent struct {
	Repeated uint64 // carried out, possibly for the second time
	Refused  uint64 // answered with EIO: see Config.Shared
}

// kernelDev is a block device that this process serves. detach and release are never called at the
// same time.
type kernelDev interface {
	path() string

	// err returns why the device is dead, for good, or nil.
	err() error

	// grow makes the kernel take over the Device's size.
	grow(ctx context.Context) error

	// detach writes back, flushes and removes. ErrInUse, and everything as before, while somebody uses
	// the device. After an error it may be called again.
	detach(ctx context.Context) error

	// survives returns nil if the device outlives this process, to be resumed by another.
	survives() error

	// release stops serving and leaves the device in place, with every request that is not answered.
	// REQUIRES: survives returned nil.
	release(ctx context.Context) error
}

// site is where an attachment is made, resumed or removed.
type site struct {
	name    string
	device  trivet.Device // nil where something is removed
	folder  *folder
	keeper  *keeper.Client // nil = there is none
	shared  bool           // see Config
	buffers *Buffers       // may be nil
	log     *slog.Logger
}

// save writes the attachment's record; state is what the transport has to know of it.
func (s *site) save(kind Kind, state any) error {
	_, tick, err := processState(os.Getpid())
	if err != nil {
		return err
	}
	b, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("encode attachment record: %w", err)
	}
	return s.folder.write(record{
		Version: recordVersion, Kind: kind, Name: s.name, BootID: bootID(), PID: os.Getpid(), StartTick: tick, State: b,
	})
}

// preferenceFor is what KindAuto tries for an attachment.
func preferenceFor(cfg *Config) []Kind {
	if cfg.Shared && cfg.Keeper != nil {
		return preferenceShared
	}
	return preference
}

// choose returns the transport for a kind; KindAuto is the first of prefer that the machine has.
func choose(k Kind, prefer []Kind) (transport, error) {
	if k != KindAuto && k != "" {
		t := transportOf(k)
		if t == nil {
			return nil, fmt.Errorf("kernel device by %s: not in this build: %w", k, trivet.ErrUnavailable)
		}
		if err := t.available(); err != nil {
			return nil, fmt.Errorf("kernel device by %s: %w", k, err)
		}
		return t, nil
	}
	why := fmt.Errorf("kernel device: %w", trivet.ErrUnavailable)
	for _, k := range prefer {
		t := transportOf(k)
		if t == nil {
			continue
		}
		err := t.available()
		if err == nil {
			return t, nil
		}
		why = fmt.Errorf("kernel device by %s: %w", k, err)
	}
	return nil, why
}

// ParseKind reads a kind as users write it; empty is KindAuto. ErrInvalid names what is allowed.
func ParseKind(s string) (Kind, error) {
	switch k := Kind(s); k {
	case "", KindAuto:
		return KindAuto, nil
	case KindUblk, KindNBD, KindFUSE:
		return k, nil
	}
	return "", fmt.Errorf("kernel device by %q: want %s, %s, %s or %s: %w",
		s, KindAuto, KindUblk, KindNBD, KindFUSE, trivet.ErrInvalid)
}
