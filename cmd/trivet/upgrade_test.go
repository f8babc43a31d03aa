package main

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// upgraded is a cluster of one node, whose server is replaced by others under a mounted volume.
type upgraded struct {
	t      *testing.T
	dir    string
	listen string
	server *exec.Cmd
}

// build builds the program as a release of that version.
func (u *upgraded) build(version string) string {
	u.t.Helper()
	exe := filepath.Join(u.dir, "trivet-"+version)
	cmd := exec.CommandContext(u.t.Context(), "go", "build", "-ldflags", "-X main.version="+version, "-o", exe, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(u.t, err, "%s", out)
	out, err = exec.CommandContext(u.t.Context(), exe, "--version").CombinedOutput()
	require.NoError(u.t, err)
	require.Contains(u.t, string(out), version)
	return exe
}

func (u *upgraded) path(name string) string { return filepath.Join(u.dir, name) }

func (u *upgraded) socket() string { return u.path("data/run/keeper/keeper.sock") }

// start starts a server of that build, which starts a keeper if none is there.
func (u *upgraded) start(exe string) {
	u.t.Helper()
	log, err := os.OpenFile(u.path("server.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(u.t, err)
	defer log.Close()
	u.server = exec.Command(exe, "server", "--node=n1", "--data="+u.path("data"), "--certs="+u.path("certs"),
		"--listen="+u.listen, "--keeper=auto")
	u.server.Stdout, u.server.Stderr = log, log
	require.NoError(u.t, u.server.Start())
}

// end ends the server, and waits until it is gone.
func (u *upgraded) end(sig syscall.Signal) {
	u.t.Helper()
	require.NoError(u.t, u.server.Process.Signal(sig))
	_ = u.server.Wait() // SIGKILL is no success
}

// ask runs a command of an operator, again and again until the server can answer it.
func (u *upgraded) ask(exe string, args ...string) string {
	u.t.Helper()
	args = append(args, "--server="+u.listen, "--certs="+u.path("client"))
	var out []byte
	require.Eventually(u.t, func() bool {
		var err error
		out, err = exec.CommandContext(u.t.Context(), exe, args...).CombinedOutput()
		return err == nil
	}, 2*time.Minute, 100*time.Millisecond, "%v", args)
	return strings.TrimSpace(string(out))
}

// killKeeper ends the keeper that a server has started, which would stay for the next server.
func (u *upgraded) killKeeper() {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: u.socket(), Net: "unixpacket"})
	if err != nil {
		return
	}
	defer conn.Close()
	raw, err := conn.SyscallConn()
	require.NoError(u.t, err)
	require.NoError(u.t, raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err == nil {
			err = unix.Kill(int(cred.Pid), unix.SIGKILL)
		}
		require.NoError(u.t, err)
	}))
	_, _ = io.Copy(io.Discard, conn) // until it is gone
}

func newUpgraded(t *testing.T) *upgraded {
	t.Helper()
	if testing.Short() {
		t.Skip("builds the program twice; not with -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(path); err != nil {
			t.Skip("needs ", path)
		}
	}
	for _, program := range []string{"fio", "mkfs.ext4", "fsck.ext4"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("needs ", program)
		}
	}
	u := &upgraded{t: t, dir: t.TempDir(), listen: freeAddress(t)}
	t.Cleanup(func() {
		if u.server != nil && u.server.ProcessState == nil {
			u.end(syscall.SIGKILL)
		}
		u.killKeeper()
		if t.Failed() {
			log, err := os.ReadFile(u.path("server.log"))
			t.Logf("%v:\n%s", err, log[max(0, len(log)-8000):])
		}
	})
	return u
}

func bytesWritten(t *testing.T, device string) int64 {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/stat") // Documentation/block/stat.rst
	require.NoError(t, err)
	n, err := strconv.ParseInt(strings.Fields(string(b))[6], 10, 64)
	require.NoError(t, err)
	return n * 512
}

// TestUpgradeUnderLoad replaces the server by one of another version, kills that one, and goes back to the
// first: what writes to the mounted volume sees no error. The keeper, started by the first server, stays.
func TestUpgradeUnderLoad(t *testing.T) {
	u := newUpgraded(t)
	older, newer := u.build("v1.0.0-older"), u.build("v1.0.1-newer")
	for _, args := range [][]string{
		{"cert", "ca", "--dir", u.path("ca")},
		{"cert", "node", "n1", "--ca", u.path("ca"), "--dir", u.path("certs")},
		{"cert", "client", "admin", "--ca", u.path("ca"), "--dir", u.path("client")},
	} {
		out, err := exec.CommandContext(t.Context(), older, args...).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	u.start(older)
	u.ask(older, "cluster", "init")
	u.ask(older, "volume", "create", "db", "--size=128Mi", "--param=replicas=1")
	device := u.ask(older, "volume", "attach", "db")
	out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-F", device).CombinedOutput()
	require.NoError(t, err, "%s", out)
	dir := t.TempDir()
	require.NoError(t, unix.Mount(device, dir, "ext4", 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })

	type result struct {
		out []byte
		err error
	}
	done, last := make(chan result, 1), make(chan struct{})
	go func() { // again and again: it must not end before the last step, however quick it is
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 6*time.Minute)
		defer cancel()
		for {
			out, err := exec.CommandContext(ctx, "fio", "--name=x", "--directory="+dir, "--ioengine=libaio", "--direct=1",
				"--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--iodepth=16", "--size=48m", "--fsync=32", "--loops=2",
				"--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0").CombinedOutput()
			select {
			case <-last:
			default:
				if err == nil {
					continue
				}
			}
			done <- result{out, err}
			return
		}
	}()
	for _, step := range []struct {
		sig  syscall.Signal
		next string
	}{{syscall.SIGTERM, newer}, {syscall.SIGKILL, newer}, {syscall.SIGTERM, older}} {
		next := bytesWritten(t, device) + 12<<20
		require.Eventually(t, func() bool {
			return len(done) > 0 || bytesWritten(t, device) > next
		}, 2*time.Minute, 5*time.Millisecond)
		if len(done) > 0 {
			break // fio failed
		}
		u.end(step.sig)
		u.start(step.next)
	}
	close(last)
	r := <-done
	require.NoError(t, r.err, "%s", r.out)

	require.Eventually(t, func() bool { // fio may have ended before the last server took over
		var kept []keptView
		text := u.ask(newer, "keeper", "list", "--socket="+u.socket(), "--output=json")
		require.NoError(t, json.Unmarshal([]byte(text), &kept))
		require.Len(t, kept, 1)
		return kept[0].Server == "serving"
	}, 2*time.Minute, 100*time.Millisecond)
	require.NoError(t, unix.Unmount(dir, 0))
	out, err = exec.CommandContext(t.Context(), "fsck.ext4", "-f", "-n", device).CombinedOutput()
	require.NoError(t, err, "%s", out)
	u.ask(older, "volume", "detach", "db")
	require.JSONEq(t, "[]", u.ask(newer, "keeper", "list", "--socket="+u.socket(), "--output=json"))
	u.end(syscall.SIGTERM)
	t.Logf("the keeper took %s", keeperMemoryOf(t, u.socket()))
}

// keeperMemoryOf returns what the keeper's process holds in memory: proc_pid_status(5), RssAnon is its own,
// RssFile is the program, shared with the server of the same build.
func keeperMemoryOf(t *testing.T, socket string) string {
	t.Helper()
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	require.NoError(t, err)
	defer conn.Close()
	raw, err := conn.SyscallConn()
	require.NoError(t, err)
	var found []string
	require.NoError(t, raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		require.NoError(t, err)
		b, err := os.ReadFile("/proc/" + strconv.Itoa(int(cred.Pid)) + "/status")
		require.NoError(t, err)
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, "Rss") || strings.HasPrefix(line, "VmRSS") {
				found = append(found, strings.Join(strings.Fields(line), " "))
			}
		}
	}))
	return strings.Join(found, ", ")
}
