package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/trivet-csi/trivet"
)

// ALPN is the protocol that peers negotiate in TLS, so that a server can serve others on its port.
const ALPN = "trivet-peer/1"

// Config is what Peers needs.
type Config struct {
	// Local is the own node, as in the own certificate.
	Local trivet.NodeID

	// ClientTLS returns the configuration to dial a node. It must present the own certificate and
	// refuse every far end but that node. Peers sets NextProtos in a copy.
	ClientTLS func(node trivet.NodeID) (*tls.Config, error)

	// PeerNode returns the node in the certificate at the far end of a handshaken connection, or an
	// error when it may not take part: it is no node, its certificate expired, it was removed. It is
	// asked when a connection begins and every Limits.RecheckEvery while it lasts.
	PeerNode func(tls.ConnectionState) (trivet.NodeID, error)

	// Book says where nodes listen.
	Book AddressBook

	// Dial opens the connection below TLS; nil means TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	// Logger; nil discards.
	Logger *slog.Logger

	// Limits; zero fields mean the default.
	Limits Limits
}

// Limits bounds what one connection may use and how long things may take.
type Limits struct {
	HandlersMax     int   // bulk requests of a connection being handled; default 1024
	HandlerBytesMax int64 // their bodies, and those of incomplete replies, bytes; default 64 MiB; at least MessageBytesMax
	// QueueBytesMax bounds the bulk messages of a connection that wait to be written, in bytes; one group
	// may fill half of it, and groups that have nothing there may go to twice as much; default 16 MiB.
	QueueBytesMax int64

	DialTimeout  time.Duration // connect, handshake and preface together; default 3 s
	SilentAfter  time.Duration // without a byte from a node it is Gone (see Watcher); default 1 s
	PingEvery    time.Duration // default SilentAfter/4
	DeadAfter    time.Duration // without a byte read, or written, the connection is dead; default 3 s
	RecheckEvery time.Duration // of Config.PeerNode; default 10 s
	BackoffMin   time.Duration // before the second dial in a row; default 50 ms, then doubling
	BackoffMax   time.Duration // default 1 s
}

// Urgent messages, as defined by urgent, have slots and queue room of their own.
const (
	urgentHandlersMax     = 4096
	urgentHandlerBytesMax = 8 << 20
	urgentQueueBytesMax   = 1 << 20
	urgentBytesMax        = 1 << 10 // a larger message is not urgent, unless it has many groups' heartbeats

	acceptedPerNodeMax = 4 // connections of one node; the oldest gives way
)

// DefaultLimits returns the defaults.
func DefaultLimits() Limits {
	return Limits{
		HandlersMax: 1024, HandlerBytesMax: 64 << 20, QueueBytesMax: 16 << 20,
		DialTimeout: 3 * time.Second, SilentAfter: time.Second, PingEvery: 250 * time.Millisecond, DeadAfter: 3 * time.Second,
		RecheckEvery: 10 * time.Second, BackoffMin: 50 * time.Millisecond, BackoffMax: time.Second,
	}
}

// Validate returns ErrInvalid, naming the field, unless the configuration can work. Zero limits are
// valid.
func (c Config) Validate() error {
	var errs []error
	refuse := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	refuse(trivet.ValidateNodeID(string(c.Local)) != nil, "Local is %q, want a node name", c.Local)
	refuse(c.ClientTLS == nil, "ClientTLS is nil")
	refuse(c.PeerNode == nil, "PeerNode is nil")
	refuse(c.Book == nil, "Book is nil")
	l := c.Limits.withDefaults()
	refuse(l.HandlersMax < 1, "Limits.HandlersMax is %d, want at least 1", l.HandlersMax)
	refuse(l.HandlerBytesMax < MessageBytesMax, "Limits.HandlerBytesMax is %d, want at least %d",
		l.HandlerBytesMax, MessageBytesMax)
	refuse(l.QueueBytesMax < 1, "Limits.QueueBytesMax is %d, want at least 1", l.QueueBytesMax)
	refuse(l.DialTimeout < 0, "Limits.DialTimeout is %s", l.DialTimeout)
	refuse(l.PingEvery < 0 || l.DeadAfter < 2*l.PingEvery,
		"Limits.DeadAfter is %s, want at least twice PingEvery, %s", l.DeadAfter, l.PingEvery)
	refuse(l.SilentAfter < 2*l.PingEvery,
		"Limits.SilentAfter is %s, want at least twice PingEvery, %s", l.SilentAfter, l.PingEvery)
	refuse(l.RecheckEvery < 0, "Limits.RecheckEvery is %s", l.RecheckEvery)
	refuse(l.BackoffMin < 0 || l.BackoffMax < l.BackoffMin,
		"Limits.BackoffMax is %s, want at least BackoffMin, %s", l.BackoffMax, l.BackoffMin)
	if len(errs) > 0 {
		return fmt.Errorf("transport config: %w: %w", errors.Join(errs...), trivet.ErrInvalid)
	}
	return nil
}

// withDefaults returns l with defaults in place of zeroes.
func (l Limits) withDefaults() Limits {
	d := DefaultLimits()
	orDefault(&l.HandlersMax, d.HandlersMax)
	orDefault(&l.HandlerBytesMax, d.HandlerBytesMax)
	orDefault(&l.QueueBytesMax, d.QueueBytesMax)
	orDefault(&l.DialTimeout, d.DialTimeout)
	orDefault(&l.SilentAfter, d.SilentAfter)
	orDefault(&l.PingEvery, l.SilentAfter/4)
	orDefault(&l.DeadAfter, d.DeadAfter)
	orDefault(&l.RecheckEvery, d.RecheckEvery)
	orDefault(&l.BackoffMin, d.BackoffMin)
	orDefault(&l.BackoffMax, d.BackoffMax)
	return l
}

func orDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// urgent reports whether m may overtake bulk: heartbeats, votes and their like, which must not wait
// behind data or elections follow. An AppendEntries with a block is too large for it.
func urgent(m Message) bool {
	if m.Kind == KindHeartbeats {
		return len(m.Body) <= fragmentBytes // one frame, as always: raftgroup bounds their number
	}
	small := m.Kind >= KindAppendEntries && m.Kind <= KindTimeoutNow ||
		m.Kind == KindStanding || m.Kind == KindTransfer || m.Kind == KindFetch ||
		m.Kind == KindSnapshotBarrier // writes wait for it
	return small && frameBytes(m) <= urgentBytesMax
}
