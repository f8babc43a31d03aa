package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

const (
	redialFirst = 50 * time.Millisecond
	redialMax   = 5 * time.Second

	// callTimeout is generous: to take a keeper for dead that is only slow costs the devices.
	callTimeout = 30 * time.Second
)

// Client is a server's connection to a keeper. It connects by itself, again and again, and gives the
// keeper everything that is held whenever it has connected. It is safe for concurrent use.
type Client struct {
	socket string
	log    *slog.Logger
	start  func() error // starts a keeper when none answers; may be nil
	cancel context.CancelFunc
	ended  chan struct{} // run has ended

	mu   sync.Mutex // held over a call, which is local and has a time limit
	link *link      // nil = not connected
	held map[string]hold
}

// hold is a connection that this process serves.
type hold struct {
	fd     int  // a duplicate of ours; -1 of a device
	device bool // see Watch
	facts  Facts
	kept   bool // the keeper at the other end of link has it
}

// link is one connection to a keeper.
type link struct {
	conn    *net.UnixConn
	answers chan answer   // replies; closed when the keeper is gone
	dead    chan struct{} // closed then, too
	quit    chan struct{} // closed when we are gone
}

type answer struct {
	message

	fd int
}

// NewClient returns a client of the keeper at socket, which need not be there yet. start, unless nil, is
// called when none answers, and shall start one. Close it.
func NewClient(socket string, start func() error, log *slog.Logger) *Client {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	//nolint:forbidigo // the client's own lifetime, ended by Close
	ctx, cancel := context.WithCancel(context.Background())
	c := &Client{
		socket: socket, start: start, log: log.With("component", "keeper"), cancel: cancel,
		ended: make(chan struct{}), held: make(map[string]hold),
	}
	go c.run(ctx)
	return c
}

// run keeps the client connected.
func (c *Client) run(ctx context.Context) {
	defer close(c.ended)
	pause := redialFirst
	for {
		l, err := c.connect()
		wait := make(<-chan struct{})
		retry := time.Duration(0)
		if err != nil {
			c.log.Debug("no keeper", "err", err)
			retry, pause = pause, min(2*pause, redialMax)
		} else {
			wait, pause = l.dead, redialFirst
		}
		if !sleep(ctx, wait, retry) {
			return
		}
	}
}

// sleep waits for wait, or for d unless that is 0. False: ctx has ended.
func sleep(ctx context.Context, wait <-chan struct{}, d time.Duration) bool {
	var after <-chan time.Time
	if d > 0 {
		after = time.After(d)
	}
	select {
	case <-wait:
	case <-after:
	case <-ctx.Done():
		return false
	}
	return true
}

func (c *Client) connect() (*link, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.connectLocked()
}

// connectLocked returns a live link, and has given the keeper at its end all that is held.
func (c *Client) connectLocked() (*link, error) {
	if c.held == nil {
		return nil, fmt.Errorf("keeper at %s: %w", c.socket, trivet.ErrClosed)
	}
	if c.link != nil {
		select {
		case <-c.link.dead:
			c.unlinkLocked()
		default:
			return c.link, nil
		}
	}
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: c.socket, Net: "unixpacket"})
	if err != nil && c.start != nil {
		if serr := c.start(); serr != nil {
			err = errors.Join(err, serr)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("keeper at %s: %w: %w", c.socket, err, trivet.ErrUnavailable)
	}
	if err := checkPeer(conn); err != nil {
		return nil, errors.Join(fmt.Errorf("keeper at %s: %w", c.socket, err), conn.Close())
	}
	l := &link{conn: conn, answers: make(chan answer), dead: make(chan struct{}), quit: make(chan struct{})}
	go l.read()
	c.link = l
	for name := range c.held {
		if err := c.putLocked(name); err != nil {
			c.log.Error("the keeper does not keep a volume's device", "volume", name, "err", err)
		}
		if c.link == nil { // it is gone again, and gets everything when it is back
			break
		}
	}
	if c.link == nil {
		return nil, fmt.Errorf("keeper at %s: %w", c.socket, trivet.ErrUnavailable)
	}
	return l, nil
}

// unlinkLocked drops the connection.
func (c *Client) unlinkLocked() {
	if c.link == nil {
		return
	}
	close(c.link.quit)
	_ = c.link.conn.Close() // messages are sent whole
	c.link = nil
	for name, h := range c.held {
		h.kept = false
		c.held[name] = h
	}
}

// read passes replies on until the connection ends.
func (l *link) read() {
	defer close(l.dead)
	defer close(l.answers)
	for {
		m, fd, err := receive(l.conn)
		if err != nil {
			return
		}
		select {
		case l.answers <- answer{m, fd}:
		case <-l.quit:
			if fd >= 0 {
				_ = unix.Close(fd) // nothing was written
			}
			return
		}
	}
}

// callLocked sends a request over the link and returns the reply. Whatever goes wrong on the way drops the
// link, so that no reply is ever taken for that to another request.
func (c *Client) callLocked(m message, fd int) (answer, error) {
	l := c.link
	err := errors.Join(l.conn.SetWriteDeadline(time.Now().Add(callTimeout)), send(l.conn, &m, fd))
	if err == nil {
		var a answer
		if a, err = l.next(); err == nil {
			return a, a.err()
		}
	}
	c.unlinkLocked()
	return answer{fd: -1}, fmt.Errorf("keeper at %s: %w: %w", c.socket, err, trivet.ErrUnavailable)
}

// next returns the next reply.
func (l *link) next() (answer, error) {
	timeout := time.NewTimer(callTimeout)
	defer timeout.Stop()
	select {
	case a, ok := <-l.answers:
		if !ok {
			return answer{fd: -1}, errors.New("it is gone")
		}
		return a, nil
	case <-timeout.C:
		return answer{fd: -1}, fmt.Errorf("no answer in %v", callTimeout)
	}
}

func (c *Client) putLocked(name string) error {
	h := c.held[name]
	op := uint16(opPut)
	if h.device {
		op = opWatch
	}
	if _, err := c.callLocked(message{op: op, name: name, facts: h.facts}, h.fd); err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	h.kept = true
	c.held[name] = h
	return nil
}

// Hold gives the keeper a duplicate of fd, which this process serves from now on, and again to every
// later keeper until Release or Drop. If there is no keeper at the moment it returns
// ErrUnavailable and holds all the same. ErrInUse: another server has taken the name.
func (c *Client) Hold(name string, fd int, facts Facts) error {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("hold %s: %w", name, err)
	}
	return c.hold(name, hold{fd: own, facts: facts})
}

// hold holds h and gives it to the keeper.
func (c *Client) hold(name string, h hold) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held == nil {
		h.close()
		return fmt.Errorf("hold %s: %w", name, trivet.ErrClosed)
	}
	c.forgetLocked(name)
	before := c.link
	c.held[name] = h
	l, err := c.connectLocked() // a new link has it already
	if err == nil && l == before {
		err = c.putLocked(name)
	}
	if err == nil && !c.held[name].kept {
		err = fmt.Errorf("hold %s: %w", name, trivet.ErrUnavailable)
	}
	if errors.Is(err, trivet.ErrInUse) {
		c.forgetLocked(name)
	}
	return err
}

// Holds reports whether the keeper has what Hold gave it: the connection survives this process.
func (c *Client) Holds(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link == nil || !c.held[name].kept {
		return false
	}
	select {
	case <-c.link.dead:
		return false
	default:
		return true
	}
}

// Take returns a descriptor of a connection that no server has, which the caller closes. No other
// client can take it until this one calls Release, Drop or Close. The watchdog runs on until Hold.
// ErrNotFound: the keeper does not have it; ErrInUse; ErrUnavailable: there is no keeper.
func (c *Client) Take(name string) (int, Facts, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.connectLocked(); err != nil {
		return -1, Facts{}, err
	}
	a, err := c.callLocked(message{op: opTake, name: name}, -1)
	if err == nil && a.fd < 0 {
		err = fmt.Errorf("keeper sent no descriptor: %w", trivet.ErrUnavailable)
	}
	if err != nil {
		return -1, Facts{}, fmt.Errorf("take %s: %w", name, err)
	}
	return a.fd, a.facts, nil
}

// Release says that this process does not serve the connection any more. The keeper has it for
// another. ErrUnavailable: there is no keeper.
func (c *Client) Release(name string) error {
	return c.end(name, message{op: opRelease, name: name})
}

// Drop makes the keeper forget the connection, and abort it first if abort is set. It need not be one of
// this client. Not kept is success.
func (c *Client) Drop(name string, abort bool) error {
	m := message{op: opDrop, name: name}
	if abort {
		m.flags = flagAbort
	}
	return c.end(name, m)
}

func (c *Client) end(name string, m message) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgetLocked(name)
	if _, err := c.connectLocked(); err != nil {
		return err
	}
	if _, err := c.callLocked(m, -1); err != nil {
		return fmt.Errorf("let go of %s: %w", name, err)
	}
	return nil
}

func (c *Client) forgetLocked(name string) {
	if h, ok := c.held[name]; ok {
		h.close()
		delete(c.held, name)
	}
}

func (h hold) close() {
	if h.fd >= 0 {
		_ = unix.Close(h.fd) // nothing was written
	}
}

// List returns what the keeper has. ErrUnavailable: there is no keeper.
func (c *Client) List() ([]Entry, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.connectLocked(); err != nil {
		return nil, err
	}
	_, entries, err := c.listLocked()
	return entries, err
}

// listLocked returns the reply to opList and the entries that follow it.
func (c *Client) listLocked() (answer, []Entry, error) {
	a, err := c.callLocked(message{op: opList}, -1)
	if err != nil {
		return a, nil, err
	}
	if a.count > entriesMax {
		c.unlinkLocked()
		return a, nil, fmt.Errorf("keeper at %s says it has %d entries: %w", c.socket, a.count, trivet.ErrInvalid)
	}
	entries := make([]Entry, 0, a.count)
	for range a.count {
		e, err := c.link.next()
		if err != nil {
			c.unlinkLocked()
			return a, nil, fmt.Errorf("keeper at %s: %w: %w", c.socket, err, trivet.ErrUnavailable)
		}
		entries = append(entries, Entry{
			Name: e.name, Facts: e.facts, Away: e.away, Device: e.flags&flagDevice != 0, Served: e.flags&flagServed != 0,
			Claimed: e.flags&flagClaimed != 0,
		})
	}
	return a, entries, nil
}

// Close drops the connection to the keeper, which keeps what it has. Idempotent.
func (c *Client) Close() {
	c.cancel()
	<-c.ended
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unlinkLocked()
	for name := range c.held {
		c.forgetLocked(name)
	}
	c.held = nil
}
