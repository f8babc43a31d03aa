// Package keeper holds the connections of FUSE devices while the process that serves them is away:
// killed, or being replaced by another version. The kernel ends a FUSE connection, and every request
// on it with an error, when the last descriptor of it is closed; a keeper has one more.
//
// What it guarantees:
//   - While the keeper runs, a connection given to it outlives its server; requests wait.
//   - One server at a time may take a connection.
//   - A connection without a server for longer than the watchdog's time is aborted: what waits gets
//     EIO, for a pod in uninterruptible sleep could not even be deleted.
//   - A ublk or nbd device, which the kernel itself keeps, is watched in the same way, and ended.
//   - A keeper that is restarted while the servers run is given everything again by their Clients.
//
// A Keeper does no I/O on a volume and knows nothing of volumes: it is small, and never has to be
// restarted for an upgrade. When it and a server are killed together, the devices of that server are
// lost as they were without a keeper.
package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

const (
	// DefaultWatchdog is longer than the start of a server, and of its node, takes.
	DefaultWatchdog = 10 * time.Minute

	entriesMax  = 4096 // connections kept
	sessionsMax = 64   // servers connected

	replyTimeout = 10 * time.Second // of a client that does not read its reply
)

// Facts is what the kernel and the first server of a connection agreed on in FUSE_INIT. A server that
// takes the connection over has to know it, for the kernel greets only once.
type Facts struct {
	Minor      uint32 // of the FUSE protocol
	Flags      uint32 // granted
	Flags2     uint32
	MaxWrite   uint32 // bytes
	Connection uint32 // minor device number, by which fusectl names the connection
}

// Entry is a connection that a keeper has.
type Entry struct {
	Name    string // of the attachment
	Facts   Facts
	Device  bool          // that the kernel keeps: its Facts are not those of a connection
	Claimed bool          // a server has it
	Served  bool          // and answers for it
	Away    time.Duration // time without a server that serves it; the watchdog counts it
}

// Config of a Keeper.
type Config struct {
	// Socket is the path of the unix socket. Its folder is made if absent.
	Socket string

	// Watchdog is how long a connection may be without a server; 0 = DefaultWatchdog.
	Watchdog time.Duration

	// Ender ends devices that the kernel keeps; nil = none is watched.
	Ender Ender

	Logger *slog.Logger // nil discards
}

// Keeper is a keeper that listens. Serve runs it.
type Keeper struct {
	watchdog time.Duration
	log      *slog.Logger
	listener *net.UnixListener
	lock     *os.File
	abort    func(connection uint32) error
	ender    Ender // may be nil

	mu       sync.Mutex
	entries  map[string]*entry
	sessions map[*session]struct{}
	closed   bool
}

// entry is a connection kept, or a device watched.
type entry struct {
	fd     int  // -1 of a device
	device bool // see Device
	facts  Facts
	owner  *session // nil = no server has it
	served bool
	since  time.Time   // the last server's end; zero while served
	watch  *time.Timer // nil while served
}

// session is a client's connection to the keeper.
type session struct{ conn *net.UnixConn }

// Open listens at cfg.Socket, for root alone: the folder is 0700 if Open makes it, the socket is
// 0600, and a client that is not of the keeper's own user is refused (SO_PEERCRED). ErrInUse: another
// keeper has the socket.
func Open(cfg Config) (*Keeper, error) {
	k := &Keeper{
		watchdog: cfg.Watchdog, log: cfg.Logger, abort: abortConnection, ender: cfg.Ender,
		entries: make(map[string]*entry), sessions: make(map[*session]struct{}),
	}
	if k.watchdog == 0 {
		k.watchdog = DefaultWatchdog
	}
	if k.watchdog < 0 || !filepath.IsAbs(cfg.Socket) {
		return nil, fmt.Errorf("open keeper at %q, watchdog %v: want an absolute path and a positive time: %w",
			cfg.Socket, cfg.Watchdog, trivet.ErrInvalid)
	}
	if k.log == nil {
		k.log = slog.New(slog.DiscardHandler)
	}
	k.log = k.log.With("component", "keeper")
	if err := k.listen(cfg.Socket); err != nil {
		return nil, fmt.Errorf("open keeper at %s: %w", cfg.Socket, err)
	}
	return k, nil
}

// listen takes the socket's lock, which dies with the process, so that whoever has it may replace
// the socket that an earlier keeper left.
func (k *Keeper) listen(socket string) (err error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return err
	}
	k.lock, err = os.OpenFile(socket+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			k.unlock()
		}
	}()
	if err := unix.Flock(int(k.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("another keeper runs: %w", trivet.ErrInUse)
	} else if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	k.listener, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return err
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return errors.Join(err, k.listener.Close())
	}
	return nil
}

// Serve answers clients until ctx ends; then it closes everything and returns nil. Connections whose
// servers live go on; the others end.
func (k *Keeper) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = k.listener.Close() })
	defer stop()
	var clients sync.WaitGroup
	var err error
	for {
		var conn *net.UnixConn
		if conn, err = k.listener.AcceptUnix(); err != nil {
			break
		}
		s := &session{conn: conn}
		if err := k.admit(s); err != nil {
			k.log.Warn("client refused", "err", err)
			_ = conn.Close() // messages are sent whole
			continue
		}
		clients.Go(func() { k.serve(s) })
	}
	k.close()
	clients.Wait()
	if ctx.Err() != nil {
		err = nil
	}
	return err
}

func (k *Keeper) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	for s := range k.sessions {
		_ = s.conn.Close() // messages are sent whole
	}
	for name, e := range k.entries {
		k.forgetLocked(name, e)
	}
	k.unlock()
}

// unlock gives the socket's lock up. Not by closing alone: a child that is between fork and exec holds the descriptor,
// and so the lock, a moment longer.
func (k *Keeper) unlock() {
	_ = unix.Flock(int(k.lock.Fd()), unix.LOCK_UN) // if it fails, closing does it
	_ = k.lock.Close()                             // nothing was written
}

func (k *Keeper) admit(s *session) error {
	if err := checkPeer(s.conn); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed || len(k.sessions) >= sessionsMax {
		return fmt.Errorf("%d clients are connected: %w", len(k.sessions), trivet.ErrNoSpace)
	}
	k.sessions[s] = struct{}{}
	return nil
}

// checkPeer refuses a peer of another user than our own, which is root.
func checkPeer(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return fmt.Errorf("who is it: %w", err)
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("process %d of user %d: %w", cred.Pid, cred.Uid, trivet.ErrInvalid)
	}
	return nil
}

// serve answers one client until it goes.
func (k *Keeper) serve(s *session) {
	for {
		m, fd, err := receive(s.conn)
		if err != nil && !errors.Is(err, trivet.ErrInvalid) { // EOF: the client is gone
			break
		}
		if err == nil {
			err = k.answer(s, &m, fd)
		} else {
			k.log.Warn("request refused", "err", err)
			err = k.reply(s, &message{op: opList, status: statusOf(err)}, -1)
		}
		if err != nil {
			k.log.Warn("client cut off", "err", err)
			break
		}
	}
	_ = s.conn.Close() // messages are sent whole
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.sessions, s)
	for name, e := range k.entries {
		if e.owner == s {
			k.releaseLocked(name, e)
		}
	}
}

func (k *Keeper) reply(s *session, m *message, fd int) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(replyTimeout)); err != nil {
		return err
	}
	return send(s.conn, m, fd)
}

// answer carries out a request and replies. It owns fd.
func (k *Keeper) answer(s *session, m *message, fd int) error {
	if m.op == opList {
		return k.answerList(s)
	}
	out := -1
	var err error
	switch {
	case (m.op == opPut) != (fd >= 0):
		err = fmt.Errorf("operation %d with descriptor %d: %w", m.op, fd, trivet.ErrInvalid)
	case m.op == opPut:
		err = k.put(s, m.name, entry{fd: fd, facts: m.facts})
	case m.op == opWatch:
		err = k.watch(s, m)
	case m.op == opTake:
		out, err = k.take(s, m)
	case m.op == opRelease:
		err = k.release(s, m.name)
	case m.op == opDrop:
		err = k.drop(s, m.name, m.flags&flagAbort != 0)
	default:
		err = fmt.Errorf("operation %d: %w", m.op, trivet.ErrInvalid)
	}
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd) // nothing was written
		}
		k.log.Warn("request refused", "volume", m.name, "err", err)
	}
	m.status, m.flags = statusOf(err), 0
	err = k.reply(s, m, out)
	if out >= 0 {
		_ = unix.Close(out) // ours was a duplicate
	}
	return err
}

// put makes s the server of what is described by with, whose descriptor it owns if it returns nil.
func (k *Keeper) put(s *session, name string, with entry) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.entries[name]
	switch {
	case e == nil && len(k.entries) >= entriesMax:
		return fmt.Errorf("put %s: %d connections are kept: %w", name, entriesMax, trivet.ErrNoSpace)
	case e == nil:
		e = &entry{}
		k.entries[name] = e
		k.log.Info("keeping a connection", "volume", name, "connection", with.facts.Connection, "device", with.device)
	case e.owner != nil && e.owner != s:
		return fmt.Errorf("put %s: %w", name, trivet.ErrInUse)
	default:
		e.close() // the new one keeps the connection
		if e.watch != nil {
			e.watch.Stop()
			k.log.Info("a server is back", "volume", name, "took", time.Since(e.since))
		}
	}
	with.owner, with.served = s, true
	*e = with
	return nil
}

func (e *entry) close() {
	if e.fd >= 0 {
		_ = unix.Close(e.fd) // nothing was written
	}
}

// take returns a duplicate of the descriptor. The watchdog runs on until the server puts it back: then
// it serves. m gets the facts.
func (k *Keeper) take(s *session, m *message) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.entries[m.name]
	if e == nil || e.device {
		return -1, fmt.Errorf("take %s: no connection of that name is kept: %w", m.name, trivet.ErrNotFound)
	}
	if e.owner != nil && e.owner != s {
		return -1, fmt.Errorf("take %s: another server has it: %w", m.name, trivet.ErrInUse)
	}
	fd, err := unix.FcntlInt(uintptr(e.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("take %s: %w: %w", m.name, err, trivet.ErrUnavailable)
	}
	e.owner, m.facts = s, e.facts
	return fd, nil
}

// release gives up a session's claim. Not kept, or not claimed, is success.
func (k *Keeper) release(s *session, name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.entries[name]
	switch {
	case e == nil || e.owner == nil:
		return nil
	case e.owner != s:
		return fmt.Errorf("release %s: another server has it: %w", name, trivet.ErrInUse)
	}
	k.releaseLocked(name, e)
	return nil
}

func (k *Keeper) releaseLocked(name string, e *entry) {
	e.owner = nil
	if !e.served { // taken and not served: the watchdog runs already
		return
	}
	e.served, e.since = false, time.Now()
	e.watch = time.AfterFunc(k.watchdog, func() { k.expire(name, e) })
	k.log.Warn("a connection is without a server", "volume", name, "limit", k.watchdog)
}

// expire aborts a connection that nobody has served for too long.
func (k *Keeper) expire(name string, e *entry) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.entries[name] != e || e.served {
		return
	}
	k.log.Error("no server came back, aborting: what waits for the volume gets an I/O error", "volume", name,
		"took", time.Since(e.since))
	if e.device {
		e.watch = time.AfterFunc(0, func() { k.end(name, e) })
		return
	}
	k.abortLocked(name, e)
	k.forgetLocked(name, e)
}

// abortLocked ends the connection, whoever else has descriptors of it. It writes to the kernel's own
// memory and waits for nobody.
func (k *Keeper) abortLocked(name string, e *entry) {
	if err := k.abort(e.facts.Connection); err != nil {
		k.log.Warn("abort by fusectl; closing the descriptor ends the connection too, unless another process has one",
			"volume", name, "err", err)
	}
}

func (k *Keeper) forgetLocked(name string, e *entry) {
	if e.watch != nil {
		e.watch.Stop()
	}
	e.close()
	delete(k.entries, name)
}

// drop forgets a connection. Not kept is success.
func (k *Keeper) drop(s *session, name string, abort bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.entries[name]
	if e == nil {
		return nil
	}
	if e.owner != nil && e.owner != s {
		return fmt.Errorf("drop %s: another server has it: %w", name, trivet.ErrInUse)
	}
	if abort && !e.device { // who gives up on a device ends it itself
		k.abortLocked(name, e)
	}
	k.forgetLocked(name, e)
	k.log.Info("a connection is kept no longer", "volume", name)
	return nil
}

// answerList replies with all entries.
func (k *Keeper) answerList(s *session) error {
	all := k.list()
	if err := k.reply(s, &message{op: opList, count: uint32(len(all)), away: k.watchdog}, -1); err != nil {
		return err
	}
	for i := range all {
		e := &all[i]
		m := message{op: opList, name: e.Name, facts: e.Facts, away: e.Away}
		if e.Served {
			m.flags |= flagServed
		}
		if e.Device {
			m.flags |= flagDevice
		}
		if e.Claimed {
			m.flags |= flagClaimed
		}
		if err := k.reply(s, &m, -1); err != nil {
			return err
		}
	}
	return nil
}

// list returns what is kept, by name.
func (k *Keeper) list() []Entry {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := make([]Entry, 0, len(k.entries))
	for name, e := range k.entries {
		entry := Entry{Name: name, Facts: e.facts, Device: e.device, Claimed: e.owner != nil, Served: e.served}
		if !e.served {
			entry.Away = time.Since(e.since)
		}
		all = append(all, entry)
	}
	slices.SortFunc(all, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	return all
}
