package blockdev

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/internal/faultdev/devtest"
)

func TestNBDConforms(t *testing.T) {
	t.Parallel()
	opsN := 300
	if testing.Short() {
		opsN = 100
	}
	for mode, flags := range map[nbdMode]uint16{
		nbdSimple:     0b1101_0110_1101, // as proto.md numbers them
		nbdStructured: 0b1101_1110_1101,
		nbdExtended:   0b1101_1110_1101,
	} {
		r := startNBD(t, 16<<20)
		c := goNBDAs(t, r.dial(t), "vol-1", mode)
		require.EqualValues(t, 16<<20, c.Size())
		require.Equal(t, flags, c.flags, "mode %d", mode)
		devtest.Run(t, c, devtest.Options{RequestBytesMax: 3 << 20, OpsN: opsN})
		require.Positive(t, r.dev.Count(faultdev.Discard))
		require.Positive(t, r.dev.Count(faultdev.WriteZeroes))
	}
}

func TestNBDRepliesOutOfOrder(t *testing.T) {
	t.Parallel()
	r := startNBD(t, 1<<20)
	c := goNBD(t, r.dial(t), "")
	gate := r.dev.Hold(faultdev.OfKind(faultdev.Write, faultdev.Flush))
	var held []<-chan error
	for i := range nbdWorkersN - 1 {
		if i == 0 {
			held = append(held, c.start(nbdCmdFlush, 0, 0, 0, nil, nil))
		} else {
			held = append(held, c.start(nbdCmdWrite, 0, 0, 4096, make([]byte, 4096), nil))
		}
		<-gate.Arrived()
	}
	require.NoError(t, c.ReadAt(t.Context(), make([]byte, 4096), 0), "a read passes all that wait")
	other := goNBD(t, r.dial(t), "")
	require.NoError(t, other.ReadAt(t.Context(), make([]byte, 1<<20), 0))
	gate.Open()
	for _, done := range held {
		require.NoError(t, <-done)
	}
}

func TestNBDFUA(t *testing.T) {
	t.Parallel()
	r := startNBD(t, 1<<20)
	c := goNBD(t, r.dial(t), "vol-1")
	for i, command := range []uint16{nbdCmdWrite, nbdCmdTrim, nbdCmdWriteZeroes} {
		var data []byte
		if command == nbdCmdWrite {
			data = make([]byte, 4096)
		}
		r.dev.Forget()
		require.NoError(t, <-c.start(command, nbdFlagFUA, int64(i)*4096, 4096, data, nil))
		ops := r.dev.Ops()
		require.Len(t, ops, 2)
		require.NotEqual(t, faultdev.Flush, ops[0].Kind)
		require.Equal(t, faultdev.Flush, ops[1].Kind, "the flush follows the effect")
	}
	r.dev.FailNth(faultdev.Write, 1, trivet.ErrNoSpace)
	r.dev.Forget()
	require.ErrorIs(t, <-c.start(nbdCmdWrite, nbdFlagFUA, 0, 4096, make([]byte, 4096), nil), trivet.ErrNoSpace)
	require.Zero(t, r.dev.Count(faultdev.Flush))
	r.dev.FailNth(faultdev.Flush, 1, trivet.ErrFenced)
	require.ErrorIs(t, <-c.start(nbdCmdWrite, nbdFlagFUA, 0, 4096, make([]byte, 4096), nil), trivet.ErrUnavailable)
}

// TestNBDRefusesRequests: each is refused by EINVAL, without effect, and the connection lives.
func TestNBDRefusesRequests(t *testing.T) {
	t.Parallel()
	r := startNBD(t, 4<<20)
	c := goNBD(t, r.dial(t), "vol-1")
	for name, q := range map[string]struct {
		command, flags uint16
		off, n         int64
		dataN          int
	}{
		"read past the end":     {nbdCmdRead, 0, 4 << 20, 4096, 0},
		"read across the end":   {nbdCmdRead, 0, 4<<20 - 4096, 8192, 0},
		"read off the world":    {nbdCmdRead, 0, -4096, 4096, 0},
		"unaligned read":        {nbdCmdRead, 0, 512, 4096, 0},
		"unaligned write":       {nbdCmdWrite, 0, 0, 512, 512},
		"unaligned trim":        {nbdCmdTrim, 0, 512, 8192, 0},
		"unaligned zeroes":      {nbdCmdWriteZeroes, 0, 0, 4095, 0},
		"trim past the end":     {nbdCmdTrim, 0, 0, 8 << 20, 0},
		"read too long":         {nbdCmdRead, 0, 0, 33 << 20, 0},
		"unaligned long write":  {nbdCmdWrite, 0, 512, 2 << 20, 2 << 20},
		"unknown command":       {99, 0, 0, 0, 0},
		"unknown flag":          {nbdCmdRead, 1 << 15, 0, 4096, 0},
		"no hole on a write":    {nbdCmdWrite, nbdFlagNoHole, 0, 4096, 4096},
		"unaligned cache":       {nbdCmdCache, 0, 0, 512, 0},
		"status, no context":    {nbdCmdBlockStatus, 0, 0, 4096, 0},
		"no fragments, simple":  {nbdCmdRead, nbdFlagDF, 0, 4096, 0},
		"payload, not extended": {nbdCmdWrite, nbdFlagPayloadLen, 0, 4096, 4096},
	} {
		err := <-c.start(q.command, q.flags, q.off, q.n, make([]byte, q.dataN), nil)
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
	}
	for _, command := range []uint16{nbdCmdWrite, nbdCmdWriteZeroes} { // proto.md, "Error values"
		err := <-c.start(command, 0, 4<<20, 4096, make([]byte, 4096*(command&1)), nil)
		require.ErrorIs(t, err, trivet.ErrNoSpace, "command %d past the end", command)
	}
	require.Empty(t, r.dev.Ops(), "nothing reached the device")
	require.NoError(t, <-c.start(nbdCmdCache, 0, 0, 4<<20, nil, nil))
	require.NoError(t, <-c.start(nbdCmdWriteZeroes, nbdFlagNoHole|nbdFlagFastZero, 0, 4096, nil, nil))
	require.NoError(t, c.ReadAt(t.Context(), make([]byte, 4096), 0))
}

// TestNBDBadInput is S6: a client that breaks the protocol is cut off; others are not.
func TestNBDBadInput(t *testing.T) {
	t.Parallel()
	flags := binary.BigEndian.AppendUint32(nil, nbdFixedNewstyle)
	ready := append(bytes.Clone(flags), nbdOption(nbdOptGo, nbdInfoData("vol-1"))...)
	flood := bytes.Clone(flags)
	for range nbdOptionsMax + 1 {
		flood = append(flood, nbdOption(99, nil)...)
	}
	huge := nbdOption(nbdOptGo, nil)
	binary.BigEndian.PutUint32(huge[12:], 1<<31)
	for name, bad := range map[string][]byte{
		"unknown client flags":      {0xff, 0xff, 0xff, 0xff},
		"no option magic":           append(bytes.Clone(flags), make([]byte, 16)...),
		"oversize option":           append(bytes.Clone(flags), huge...),
		"option flood":              flood,
		"unknown export, old style": append(bytes.Clone(flags), nbdOption(nbdOptExportName, []byte("../etc"))...),
		"no request magic":          append(bytes.Clone(ready), make([]byte, nbdRequestBytes)...),
		"2 GiB write":               append(bytes.Clone(ready), nbdHeader(nbdCmdWrite, 0, 1, 0, 1<<31)...),
		"extended, old export": slices.Concat(flags, nbdOption(nbdOptExtended, nil),
			nbdOption(nbdOptExportName, []byte("vol-1"))),
		"compact request after extended headers": slices.Concat(flags, nbdOption(nbdOptExtended, nil),
			nbdOption(nbdOptGo, nbdInfoData("vol-1")), nbdHeader(nbdCmdRead, 0, 1, 0, 4096), make([]byte, 4)),
		"vast payload of a read": slices.Concat(flags, nbdOption(nbdOptExtended, nil),
			nbdOption(nbdOptGo, nbdInfoData("vol-1")), nbdExtHeader(nbdCmdRead, nbdFlagPayloadLen, 1, 0, 1<<62)),
	} {
		synctest.Test(t, func(t *testing.T) {
			s := &nbdServer{
				export: nbdExport{name: "vol-1", device: faultdev.NewMem(1 << 20)}, log: slog.New(slog.DiscardHandler),
				slots: make(chan struct{}, nbdClientsMax),
			}
			var served sync.WaitGroup
			dial := func() net.Conn {
				client, server := net.Pipe()
				served.Go(func() { s.handle(t.Context(), server) })
				return client
			}
			good, conn, began := goNBD(t, dial(), "vol-1"), dial(), time.Now()
			go func() { _, _ = conn.Write(bad) }() // the server may hang up before it has all
			_, err := io.Copy(io.Discard, conn)
			require.NoError(t, err, name)
			require.Zero(t, time.Since(began), "%s: it is not given any time", name)
			require.NoError(t, good.WriteAt(t.Context(), make([]byte, 4096), 0), "%s: others must not notice", name)
			require.NoError(t, errors.Join(conn.Close(), good.conn.Close()))
			served.Wait()
		})
	}
}

func TestNBDOptions(t *testing.T) {
	t.Parallel()
	r := startNBD(t, 1<<20)
	conn := r.dial(t)
	_, err := io.ReadFull(conn, make([]byte, 18))
	require.NoError(t, err)
	writeBytes(t, conn, binary.BigEndian.AppendUint32(nil, nbdFixedNewstyle))
	for _, c := range []struct {
		name   string
		option uint32
		data   []byte
		want   []uint32
	}{
		{"starttls", nbdOptStartTLS, nil, []uint32{nbdRepPolicy}},
		{"unknown", 99, []byte("x"), []uint32{nbdRepUnsup}},
		{"list", nbdOptList, nil, []uint32{nbdRepServer, nbdRepAck}},
		{"list with data", nbdOptList, []byte{1}, []uint32{nbdRepInvalid}},
		{"info", nbdOptInfo, nbdInfoData("vol-1", nbdInfoName), []uint32{nbdRepInfo, nbdRepInfo, nbdRepInfo, nbdRepAck}},
		{"info of the default", nbdOptInfo, nbdInfoData(""), []uint32{nbdRepInfo, nbdRepInfo, nbdRepAck}},
		{"go to an unknown export", nbdOptGo, nbdInfoData("../vol-1"), []uint32{nbdRepUnknown}},
		{"go without data", nbdOptGo, nil, []uint32{nbdRepInvalid}},
		{"name longer than the data", nbdOptGo, []byte{0, 0, 1, 0, 'x', 0, 0}, []uint32{nbdRepInvalid}},
		{"name length overflows", nbdOptGo, []byte{255, 255, 255, 255, 0, 0}, []uint32{nbdRepInvalid}},
		{"more types than data", nbdOptGo, []byte{0, 0, 0, 0, 0, 9}, []uint32{nbdRepInvalid}},
		{"context before structured", nbdOptSetMeta, nbdMetaData("", nbdAllocation), []uint32{nbdRepInvalid}},
		{"structured with data", nbdOptStructuredReply, []byte{1}, []uint32{nbdRepInvalid}},
		{"structured", nbdOptStructuredReply, nil, []uint32{nbdRepAck}},
		{"structured again", nbdOptStructuredReply, nil, []uint32{nbdRepInvalid}},
		{"all contexts", nbdOptListMeta, nbdMetaData(""), []uint32{nbdRepMeta, nbdRepAck}},
		{"contexts of base", nbdOptListMeta, nbdMetaData("vol-1", "x:", "base:"), []uint32{nbdRepMeta, nbdRepAck}},
		{"contexts of others", nbdOptListMeta, nbdMetaData("vol-1", "qemu:dirty-bitmap:"), []uint32{nbdRepAck}},
		{"set no context", nbdOptSetMeta, nbdMetaData(""), []uint32{nbdRepAck}},
		{"set a namespace", nbdOptSetMeta, nbdMetaData("", "base:"), []uint32{nbdRepAck}},
		{"set a context", nbdOptSetMeta, nbdMetaData("", "a:b", nbdAllocation), []uint32{nbdRepMeta, nbdRepAck}},
		{"context of an unknown export", nbdOptSetMeta, nbdMetaData("x", nbdAllocation), []uint32{nbdRepUnknown}},
		{"context without data", nbdOptSetMeta, nil, []uint32{nbdRepInvalid}},
		{"more queries than data", nbdOptSetMeta, []byte{0, 0, 0, 0, 255, 255, 255, 255}, []uint32{nbdRepInvalid}},
		{"data after the queries", nbdOptSetMeta, append(nbdMetaData(""), 0), []uint32{nbdRepInvalid}},
		{"extended headers", nbdOptExtended, nil, []uint32{nbdRepAck}},
		{"extended headers again", nbdOptExtended, nil, []uint32{nbdRepInvalid}},
		{"structured after extended", nbdOptStructuredReply, nil, []uint32{nbdRepExtReqd}},
		{"abort", nbdOptAbort, nil, []uint32{nbdRepAck}},
	} {
		writeBytes(t, conn, nbdOption(c.option, c.data))
		for _, want := range c.want {
			kind, _ := readOptionReply(t, conn, c.option)
			require.Equal(t, want, kind, c.name)
		}
	}
	_, err = conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
}

func TestNBDOldStyleExport(t *testing.T) {
	t.Parallel()
	for _, flags := range []uint32{nbdFixedNewstyle, nbdFixedNewstyle | nbdNoZeroes} {
		r := startNBD(t, 1<<20)
		conn := r.dial(t)
		_, err := io.ReadFull(conn, make([]byte, 18))
		require.NoError(t, err)
		writeBytes(t, conn, binary.BigEndian.AppendUint32(nil, flags))
		writeBytes(t, conn, nbdOption(nbdOptExportName, []byte("vol-1")))
		n := 10
		if flags&nbdNoZeroes == 0 {
			n += 124
		}
		reply := make([]byte, n)
		_, err = io.ReadFull(conn, reply)
		require.NoError(t, err)
		require.EqualValues(t, 1<<20, binary.BigEndian.Uint64(reply))
		c := &nbdClient{conn: conn, sizeBytes: 1 << 20, waiting: map[uint64]*nbdCalled{}}
		go c.receive()
		require.NoError(t, c.Flush(t.Context()))
	}
}

func TestNBDGoodbyeWaitsForReplies(t *testing.T) {
	t.Parallel()
	r := startNBD(t, 1<<20)
	c := goNBD(t, r.dial(t), "vol-1")
	gate := r.dev.Hold(nil)
	done := c.start(nbdCmdWrite, 0, 0, 4096, make([]byte, 4096), nil)
	<-gate.Arrived()
	writeBytes(t, c.conn, nbdHeader(nbdCmdDisconnect, 0, 0, 0, 0))
	gate.Open()
	require.NoError(t, <-done)
}

// waitingDevice's Flush waits until its context ends, and says so.
type waitingDevice struct {
	nullDevice
	began, ended chan struct{}
}

func (w waitingDevice) Flush(ctx context.Context) error {
	close(w.began)
	<-ctx.Done()
	close(w.ended)
	return context.Cause(ctx)
}

func TestNBDDroppedClientCancelsItsRequests(t *testing.T) {
	t.Parallel()
	dev := waitingDevice{began: make(chan struct{}), ended: make(chan struct{})}
	client, server := net.Pipe()
	s := &nbdServer{
		export: nbdExport{name: "v", device: dev}, log: slog.New(slog.DiscardHandler), slots: make(chan struct{}, 1),
		wait: time.Hour,
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.handle(t.Context(), server)
	}()
	c := goNBD(t, client, "v")
	c.start(nbdCmdFlush, 0, 0, 0, nil, nil)
	<-dev.began
	require.NoError(t, client.Close())
	<-dev.ended
	<-done
}

func TestNBDStopEndsRequests(t *testing.T) {
	t.Parallel()
	r := startNBD(t, 1<<20)
	c := goNBD(t, r.dial(t), "vol-1")
	gate := r.dev.Hold(nil)
	done := c.start(nbdCmdFlush, 0, 0, 0, nil, nil)
	<-gate.Arrived()
	r.stop(t)
	require.Error(t, <-done)
}

func TestNBDClientsAreBounded(t *testing.T) {
	t.Parallel()
	r := startNBD(t, 1<<20)
	var clients []*nbdClient
	for range nbdClientsMax {
		clients = append(clients, goNBD(t, r.dial(t), "vol-1"))
	}
	extra := r.dial(t)
	greetNBD(t, extra)
	askNBD(t, extra, nbdOptGo, nbdInfoData("vol-1"), nbdRepPolicy)
	_, err := extra.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	require.NoError(t, clients[0].conn.Close())
	require.Eventually(t, func() bool { // its place becomes free
		conn := r.dial(t)
		greetNBD(t, conn)
		writeBytes(t, conn, nbdOption(nbdOptGo, nbdInfoData("vol-1")))
		kind, _ := readOptionReply(t, conn, nbdOptGo)
		return kind == nbdRepInfo
	}, time.Minute, time.Millisecond)
	require.NoError(t, clients[1].ReadAt(t.Context(), make([]byte, 4096), 0))
}

func TestNBDSocket(t *testing.T) {
	t.Parallel()
	r := startNBD(t, 1<<20)
	require.NoError(t, r.dial(t).Close())
	info, err := os.Stat(r.socket)
	require.NoError(t, err)
	require.Equal(t, os.ModeSocket|0o600, info.Mode())

	_, err = ListenNBD(t.Context(), r.socket)
	require.ErrorIs(t, err, trivet.ErrInUse, "somebody listens")
	require.NoError(t, r.dial(t).Close(), "and still does")

	plain := filepath.Join(t.TempDir(), "plain")
	require.NoError(t, os.WriteFile(plain, []byte("keep"), 0o600))
	_, err = ListenNBD(t.Context(), plain)
	require.ErrorIs(t, err, trivet.ErrExists)
	require.FileExists(t, plain)
	_, err = ListenNBD(t.Context(), filepath.Join(t.TempDir(), "none", "s"))
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestNBDRefusesConfigurations(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	err = ServeNBD(t.Context(), ln, NBDConfig{Export: "v", Device: nullDevice{}})
	require.ErrorIs(t, err, trivet.ErrInvalid, "a network needs TLS")
	_, err = ln.Accept()
	require.ErrorIs(t, err, net.ErrClosed)
	ln, err = net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	err = ServeNBD(t.Context(), ln, NBDConfig{Export: strings.Repeat("x", 5000), TLS: makeNBDCerts(t).server()})
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

func TestNBDReplacesAStaleSocket(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "nbd")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, unix.Bind(fd, &unix.SockaddrUnix{Name: socket}))
	require.NoError(t, unix.Close(fd)) // as a killed server leaves it
	ctx, cancel := context.WithCancel(t.Context())
	ln, err := listenUnix(ctx, socket)
	require.NoError(t, err)
	conn, err := net.Dial("unix", socket)
	require.NoError(t, err)
	cancel()
	require.NoError(t, conn.Close())
	require.NoError(t, ln.Close())
}

// TestNBDRealClients runs the programs that people use.
func TestNBDRealClients(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	image, back := filepath.Join(dir, "image"), filepath.Join(dir, "back")
	data := bytes.Repeat([]byte("trivet! "), 1<<17) // 1 MiB, then a hole
	require.NoError(t, os.WriteFile(image, append(data, make([]byte, 3<<20)...), 0o600))
	for _, c := range []struct {
		program string
		args    []string // URI, IMAGE, BACK, SOCKET are replaced
	}{
		{"nbdinfo", []string{"--can", "multi-conn", "URI"}},
		{"nbdinfo", []string{"--can", "df", "URI"}},
		{"nbdinfo", []string{"--can", "fast-zero", "URI"}},
		{"nbdinfo", []string{"--map", "URI"}},
		{"nbdinfo", []string{"--list", "nbd+unix:///?socket=SOCKET"}},
		{"nbdcopy", []string{"--flush", "IMAGE", "URI"}},
		{"nbdcopy", []string{"--connections=4", "--destination-is-zero", "URI", "BACK"}},
		{"qemu-img", []string{"info", "URI"}},
		{"qemu-img", []string{"convert", "-n", "-f", "raw", "-O", "raw", "IMAGE", "URI"}},
		{"qemu-img", []string{"compare", "-f", "raw", "-F", "raw", "IMAGE", "URI"}},
		{"qemu-io", []string{
			"-f", "raw", "-c", "write -P 7 -f 0 64k", "-c", "discard 64k 64k", "-c", "write -z 128k 64k",
			"-c", "flush", "-c", "read -P 7 0 64k", "-c", "read -P 0 64k 128k", "URI",
		}},
		{"fio", []string{
			"--name=x", "--ioengine=nbd", "--uri=URI", "--rw=randrw", "--bs=4k", "--iodepth=16", "--size=4m",
			"--verify=crc32c", "--fsync=32", "--fdatasync=0", "--do_verify=1", "--loops=2",
		}},
	} {
		t.Run(c.program+" "+c.args[0], func(t *testing.T) {
			path, err := exec.LookPath(c.program)
			if err != nil {
				t.Skipf("needs the program %s", c.program)
			}
			r := startNBD(t, 4<<20)
			require.NoError(t, r.dial(t).Close())
			mem := make([]byte, 4<<20)
			if c.args[0] != "--flush" { // all but the first copy find the image there
				copy(mem, data)
				require.NoError(t, r.dev.WriteAt(t.Context(), mem, 0))
			}
			replacer := strings.NewReplacer("URI", "nbd+unix:///vol-1?socket="+r.socket, "SOCKET", r.socket,
				"IMAGE", image, "BACK", back)
			args := make([]string, len(c.args))
			for i, a := range c.args {
				args[i] = replacer.Replace(a)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, path, args...)
			cmd.Dir = dir
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			switch {
			case c.args[0] == "--flush":
				require.NoError(t, r.dev.ReadAt(t.Context(), mem, 0))
				require.True(t, bytes.HasPrefix(mem, data))
				require.Positive(t, r.dev.Count(faultdev.Flush))
			case strings.HasPrefix(c.args[0], "--connections"):
				got, err := os.ReadFile(back)
				require.NoError(t, err)
				require.True(t, bytes.Equal(mem, got))
			case c.program == "qemu-io":
				require.Positive(t, r.dev.Count(faultdev.Discard))
				require.Positive(t, r.dev.Count(faultdev.WriteZeroes))
			}
		})
	}
}
