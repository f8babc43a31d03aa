package keeper

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

var facts = Facts{Minor: 41, Flags: 1, Flags2: 0x80, MaxWrite: 1 << 20, Connection: 1 << 30}

// running is a keeper that runs until the test ends.
type running struct {
	*Keeper

	socket string
	stop   func()
}

func startAt(t *testing.T, socket string) *running {
	t.Helper()
	return startWith(t, Config{Socket: socket})
}

func startWith(t *testing.T, cfg Config) *running {
	t.Helper()
	socket := cfg.Socket
	k, err := Open(cfg)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- k.Serve(ctx) }()
	r := &running{Keeper: k, socket: socket, stop: func() {
		cancel()
		if ended != nil {
			require.NoError(t, <-ended)
		}
		ended = nil
	}}
	t.Cleanup(r.stop)
	return r
}

func start(t *testing.T) *running {
	t.Helper()
	return startAt(t, filepath.Join(t.TempDir(), "keeper", "sock"))
}

func (r *running) client(t *testing.T) *Client {
	t.Helper()
	c := NewClient(r.socket, nil, nil)
	t.Cleanup(c.Close)
	return c
}

// kept is a pipe in place of a FUSE connection: its reader sees the end when the last descriptor of
// the other end is closed.
type kept struct {
	t *testing.T
	r *os.File
	w *os.File
}

func newKept(t *testing.T) *kept {
	t.Helper()
	r, w, err := os.Pipe()
	require.NoError(t, err)
	t.Cleanup(func() { r.Close(); w.Close() })
	return &kept{t, r, w}
}

func (k *kept) fd() int { return int(k.w.Fd()) }

func (k *kept) requireOpen() {
	k.t.Helper()
	raw, err := k.r.SyscallConn()
	require.NoError(k.t, err)
	ended := -1
	require.NoError(k.t, raw.Control(func(fd uintptr) {
		ended, err = unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, 0) // POLLHUP, whether asked for or not
	}))
	require.NoError(k.t, err)
	require.Zero(k.t, ended, "the connection has ended")
}

// requireEnd waits for the end.
func (k *kept) requireEnd() {
	k.t.Helper()
	require.NoError(k.t, k.r.SetReadDeadline(time.Now().Add(time.Minute)))
	_, err := k.r.Read(make([]byte, 1))
	require.ErrorIs(k.t, err, io.EOF)
}

func TestPutTakeDrop(t *testing.T) {
	t.Parallel()
	r := start(t)
	a, conn := r.client(t), newKept(t)
	require.NoError(t, a.Hold("vol-1", conn.fd(), facts))
	require.True(t, a.Holds("vol-1"))
	require.False(t, a.Holds("vol-2"))
	require.NoError(t, conn.w.Close())
	a.Close() // as a death of the process does
	conn.requireOpen()

	b, c := r.client(t), r.client(t)
	_, _, err := b.Take("vol-2")
	require.ErrorIs(t, err, trivet.ErrNotFound)
	var fd int
	require.Eventually(t, func() bool { // the keeper hears of the death a moment later
		var got Facts
		fd, got, err = b.Take("vol-1")
		return err == nil && got == facts
	}, time.Minute, time.Millisecond)
	_, _, err = c.Take("vol-1")
	require.ErrorIs(t, err, trivet.ErrInUse, "one server at a time")
	require.ErrorIs(t, c.Hold("vol-1", int(conn.r.Fd()), facts), trivet.ErrInUse)
	require.ErrorIs(t, c.Release("vol-1"), trivet.ErrInUse)
	require.ErrorIs(t, c.Drop("vol-1", true), trivet.ErrInUse)
	entries, err := c.List()
	require.NoError(t, err)
	require.Len(t, entries, 1)
	require.Equal(t, Entry{Name: "vol-1", Facts: facts, Claimed: true, Away: entries[0].Away}, entries[0])
	require.Positive(t, entries[0].Away, "taken is not served yet")

	require.NoError(t, b.Hold("vol-1", fd, facts))
	require.NoError(t, unix.Close(fd))
	entries, err = c.List()
	require.NoError(t, err)
	require.Equal(t, []Entry{{Name: "vol-1", Facts: facts, Claimed: true, Served: true}}, entries)
	require.NoError(t, b.Release("vol-1"))
	conn.requireOpen()
	fd, _, err = c.Take("vol-1")
	require.NoError(t, err, "released is free at once")
	require.NoError(t, unix.Close(fd))
	require.NoError(t, c.Drop("vol-1", false))
	require.NoError(t, c.Drop("vol-1", false), "the second time there is nothing to do")
	require.NoError(t, c.Release("vol-1"))
	conn.requireEnd()
}

func TestClientGivesALaterKeeperEverything(t *testing.T) {
	t.Parallel()
	r := start(t)
	c := r.client(t)
	one, two := newKept(t), newKept(t)
	require.NoError(t, c.Hold("vol-1", one.fd(), facts))
	r.stop()
	require.Eventually(t, func() bool { return !c.Holds("vol-1") }, time.Minute, time.Millisecond)
	require.ErrorIs(t, c.Hold("vol-2", two.fd(), facts), trivet.ErrUnavailable)
	require.NoError(t, one.w.Close())
	one.requireOpen() // the client has one itself

	r = startAt(t, r.socket)
	require.Eventually(t, func() bool { return c.Holds("vol-1") && c.Holds("vol-2") }, time.Minute, time.Millisecond)
	require.Len(t, r.list(), 2)
	c.Close()
	one.requireOpen()
}

// TestKeeperThatDiesAtOnce: a keeper that is gone again before it has been given everything is no more than one that is
// away.
func TestKeeperThatDiesAtOnce(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "sock")
	c := NewClient(socket, nil, nil)
	t.Cleanup(c.Close)
	for _, name := range []string{"vol-1", "vol-2", "vol-3"} {
		require.ErrorIs(t, c.Hold(name, newKept(t).fd(), facts), trivet.ErrUnavailable)
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	require.NoError(t, err)
	conn, err := l.AcceptUnix()
	require.NoError(t, err)
	m, fd, err := receive(conn)
	require.NoError(t, err)
	require.EqualValues(t, opPut, m.op)
	require.NoError(t, unix.Close(fd))
	require.NoError(t, l.Close())
	require.NoError(t, conn.Close())

	r := startAt(t, socket)
	require.Eventually(t, func() bool { return c.Holds("vol-1") && c.Holds("vol-2") && c.Holds("vol-3") }, time.Minute,
		time.Millisecond)
	require.Len(t, r.list(), 3)
}

func TestOneKeeperASocket(t *testing.T) {
	t.Parallel()
	r := start(t)
	_, err := Open(Config{Socket: r.socket})
	require.ErrorIs(t, err, trivet.ErrInUse)
	c := r.client(t)
	_, err = c.List()
	require.NoError(t, err, "and the first is not disturbed")
	st, err := os.Stat(r.socket)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode().Perm())
	st, err = os.Stat(filepath.Dir(r.socket))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o700), st.Mode().Perm())
	_, err = Open(Config{Socket: "sock"})
	require.ErrorIs(t, err, trivet.ErrInvalid)
	_, err = Open(Config{Socket: r.socket + "2", Watchdog: -1})
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

// TestOtherUsersAreRefused connects as another user, by a thread that changes its own user alone.
func TestOtherUsersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be somebody else")
	}
	r := start(t)
	require.NoError(t, os.Chmod(r.socket, 0o666)) // so that the credentials alone decide
	for dir := filepath.Dir(r.socket); dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) {
		require.NoError(t, os.Chmod(dir, 0o711))
	}
	type result struct {
		conn *net.UnixConn
		err  error
	}
	done := make(chan result)
	var asOther func()
	asOther = func() { // the thread ends with the goroutine, for it stays locked
		lockThread()
		if unix.Gettid() == unix.Getpid() { // the main thread never ends, and whose it is, so is the process
			defer runtime.UnlockOSThread()
			other := make(chan struct{})
			go func() { defer close(other); asOther() }()
			<-other
			return
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			done <- result{nil, errno}
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: r.socket})
		}
		if err != nil {
			done <- result{nil, err}
			return
		}
		f := os.NewFile(uintptr(fd), "client")
		conn, err := net.FileConn(f)
		f.Close()
		unixConn, _ := conn.(*net.UnixConn)
		done <- result{unixConn, err}
	}
	go asOther()
	got := <-done
	require.NoError(t, got.err)
	defer got.conn.Close()
	_ = send(got.conn, &message{op: opList}, -1) // it may be closed already
	_, _, err := receive(got.conn)
	require.Error(t, err, "no answer")
	require.NotErrorIs(t, err, trivet.ErrInvalid)
}

// TestHostileClient: nonsense is refused and disturbs nobody; descriptors that nobody asked for are
// closed.
func TestHostileClient(t *testing.T) {
	t.Parallel()
	r := start(t)
	good, conn := r.client(t), newKept(t)
	require.NoError(t, good.Hold("vol-1", conn.fd(), facts))
	bad, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: r.socket, Net: "unixpacket"})
	require.NoError(t, err)
	defer bad.Close()
	refused := func(what string) {
		t.Helper()
		m, _, err := receive(bad)
		require.NoError(t, err, what)
		require.ErrorIs(t, m.err(), trivet.ErrInvalid, what)
	}
	for _, b := range [][]byte{{1}, make([]byte, messageBytes), make([]byte, 4096)} {
		_, err := bad.Write(b)
		require.NoError(t, err)
		refused("bytes")
	}
	stray := newKept(t)
	for what, m := range map[string]message{
		"put without a descriptor": {op: opPut, name: "vol-2"}, "unknown operation": {op: 99, name: "vol-2"},
	} {
		require.NoError(t, send(bad, &m, -1))
		refused(what)
	}
	require.NoError(t, send(bad, &message{op: opTake, name: "vol-1"}, stray.fd()))
	refused("take with a descriptor")
	var b [messageBytes]byte
	(&message{op: opPut, name: "vol-2"}).encode(b[:])
	_, _, err = bad.WriteMsgUnix(b[:], unix.UnixRights(stray.fd(), stray.fd()), nil)
	require.NoError(t, err)
	refused("two descriptors")
	require.NoError(t, stray.w.Close())
	stray.requireEnd()
	require.Len(t, r.list(), 1)
	require.True(t, good.Holds("vol-1"))
	conn.requireOpen()
}

func TestClosedClient(t *testing.T) {
	t.Parallel()
	r := start(t)
	c, conn := r.client(t), newKept(t)
	c.Close()
	c.Close()
	require.ErrorIs(t, c.Hold("vol-1", conn.fd(), facts), trivet.ErrClosed)
	_, err := c.List()
	require.ErrorIs(t, err, trivet.ErrClosed)
	require.Error(t, c.Drop("vol-1", false))
}

// TestStartOfAKeeper: a client without a keeper starts one.
func TestStartOfAKeeper(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "keeper", "sock")
	c := NewClient(socket, func() error {
		startAt(t, socket)
		return nil
	}, nil)
	defer c.Close() // before the keeper ends, or it starts another one
	require.Eventually(t, func() bool { _, err := c.List(); return err == nil }, time.Minute, time.Millisecond)
}

// TestWatchdog counts time without a server that serves, whoever has taken the connection meanwhile.
func TestWatchdog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var aborted []uint32
		k := &Keeper{
			watchdog: 10 * time.Minute, log: newTestLog(t), entries: map[string]*entry{}, sessions: map[*session]struct{}{},
			abort: func(c uint32) error { aborted = append(aborted, c); return nil },
		}
		put := func(s *session, connection uint32) {
			fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			require.NoError(t, err)
			require.NoError(t, k.put(s, "vol-1", entry{fd: fd, facts: Facts{Connection: connection}}))
		}
		pass := func(d time.Duration) {
			<-time.After(d)
			synctest.Wait()
		}
		first, second := &session{}, &session{}
		put(first, 5)
		pass(time.Hour)
		require.Empty(t, aborted, "served")
		require.NoError(t, k.release(first, "vol-1"))
		pass(9 * time.Minute)
		put(second, 5)
		pass(time.Hour)
		require.Empty(t, aborted, "served again in time")

		require.NoError(t, k.release(second, "vol-1"))
		pass(6 * time.Minute)
		fd, err := k.take(first, &message{name: "vol-1"})
		require.NoError(t, err)
		require.NoError(t, unix.Close(fd))
		pass(2 * time.Minute)
		require.NoError(t, k.release(first, "vol-1"), "it gave up")
		pass(time.Minute)
		require.Empty(t, aborted)
		_, err = k.take(second, &message{name: "vol-1"})
		require.NoError(t, err)
		pass(2 * time.Minute)
		require.Equal(t, []uint32{5}, aborted, "to take is not to serve")
		require.Empty(t, k.list())
		require.NoError(t, k.drop(second, "vol-1", true))
		require.Len(t, aborted, 1)

		put(first, 6)
		require.NoError(t, k.drop(first, "vol-1", true))
		require.Equal(t, []uint32{5, 6}, aborted)
		put(first, 7)
		require.NoError(t, k.drop(first, "vol-1", false))
		require.Len(t, aborted, 2, "not asked for")
	})
}

func TestAbortOfAConnectionThatIsGone(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	require.NoError(t, abortConnection(1<<30))
}
