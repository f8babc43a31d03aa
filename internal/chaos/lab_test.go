package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// inSpaceDo runs do in a network namespace, on a thread that ends with it.
func inSpaceDo(t *testing.T, space string, do func() error) error {
	t.Helper()
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread must not serve others
		fd, err := os.Open(spacePath(space))
		if err == nil {
			defer fd.Close()
			err = unix.Setns(int(fd.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = do()
		}
		result <- err
	}()
	return <-result
}

// mustLab makes a lab without servers, and checks at the end that it leaves nothing.
func mustLab(t *testing.T) *lab {
	t.Helper()
	if err := checkMachine(); err != nil {
		t.Skip(err)
	}
	l, err := newLab(t.TempDir(), "/nonexistent", 3)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.close(context.WithoutCancel(t.Context()))) })
	return l
}

// A datagram that does not arrive within knockWait counts as lost; where one is to arrive more are sent until
// arrivesWait is over: the kernel may be slow, and a new bridge loses some.
const (
	knockWait   = 300 * time.Millisecond
	arrivesWait = time.Minute
)

// knock asks whether node from reaches node to: a datagram must arrive.
func knock(t *testing.T, l *lab, from, to int, conns []net.PacketConn) bool {
	t.Helper()
	text := fmt.Sprintf("%d-%d-%d", from, to, time.Now().UnixNano())
	require.NoError(t, inSpaceDo(t, l.nodes[from].space, func() error {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "udp", conns[to].LocalAddr().String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write([]byte(text))
		return err
	}))
	buf := make([]byte, 100)
	for {
		require.NoError(t, conns[to].SetReadDeadline(time.Now().Add(knockWait)))
		n, _, err := conns[to].ReadFrom(buf)
		if err != nil {
			return false
		}
		if string(buf[:n]) == text {
			return true
		}
	}
}

// arrives knocks until it is heard.
func arrives(t *testing.T, l *lab, from, to int, conns []net.PacketConn) bool {
	t.Helper()
	for began := time.Now(); time.Since(began) < arrivesWait; {
		if knock(t, l, from, to, conns) {
			return true
		}
	}
	return false
}

// TestNetworkFaults: the rules cut what they say, in the direction they say, and healing opens it again.
func TestNetworkFaults(t *testing.T) {
	l := mustLab(t)
	require.NoError(t, l.openNetwork(t.Context()))
	conns := make([]net.PacketConn, len(l.nodes))
	for i, n := range l.nodes {
		require.NoError(t, inSpaceDo(t, n.space, func() (err error) {
			conns[i], err = (&net.ListenConfig{}).ListenPacket(t.Context(), "udp", nodeIP(i)+":0")
			return err
		}))
		defer conns[i].Close()
	}
	requireReach := func(cut map[link]bool) {
		t.Helper()
		require.NoError(t, l.cut(t.Context(), cut, 0))
		for from := range l.nodes {
			for to := range l.nodes {
				switch {
				case from == to:
				case cut[link{from, to}]:
					require.False(t, knock(t, l, from, to, conns), "n%d to n%d", from+1, to+1)
				default:
					require.True(t, arrives(t, l, from, to, conns), "n%d to n%d", from+1, to+1)
				}
			}
		}
	}
	requireReach(nil)
	for _, e := range []event{
		{Class: classPartition, Nodes: []int{0}},
		{Class: classOneWay, Nodes: []int{1, 2}},
		{Class: classBridge, Nodes: []int{1}},
	} {
		requireReach(linksCut(e, len(l.nodes)))
	}
	requireReach(nil)
	require.NoError(t, l.cut(t.Context(), nil, 99))
	lost := func() bool {
		for range 5 {
			if !knock(t, l, 0, 1, conns) {
				return true
			}
		}
		return false
	}
	require.True(t, lost(), "99 %% of the packets are to be lost")
}

// TestDiskFaults: a full filesystem is full, a frozen one lets nobody write, and both heal.
func TestDiskFaults(t *testing.T) {
	l := mustLab(t)
	require.NoError(t, l.openDisks(t.Context()))
	n := l.nodes[0]
	write := func() error { return os.WriteFile(filepath.Join(n.store(), "file"), make([]byte, blockBytes), 0o600) }
	require.NoError(t, write())
	require.NoError(t, n.fill())
	require.ErrorIs(t, os.WriteFile(filepath.Join(n.store(), "more"), make([]byte, blockBytes), 0o600), unix.ENOSPC)
	require.NoError(t, os.Remove(n.fillPath()))
	require.NoError(t, write())

	require.NoError(t, n.freeze(t.Context()))
	done := make(chan error, 1)
	go func() { done <- write() }()
	select {
	case err := <-done:
		t.Errorf("a write to a frozen filesystem returned: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	require.NoError(t, n.thaw(t.Context()))
	require.NoError(t, <-done)
	require.NoError(t, l.unmount(t.Context(), n))
	require.NoError(t, l.mount(t.Context(), n, 1), "another node's filesystem")
}

// TestNothingIsLeft: close finds and ends a process, a frozen and mounted filesystem and namespaces, and leftovers
// tells when it would not.
func TestNothingIsLeft(t *testing.T) {
	l := mustLab(t)
	require.NoError(t, l.openNetwork(t.Context()))
	require.NoError(t, l.openDisks(t.Context()))
	line := l.nodes[0].inSpace("sleep", "1000")
	p, err := l.procs.start(exec.Command(line[0], line[1:]...))
	require.NoError(t, err)
	require.NoError(t, l.nodes[0].freeze(t.Context()))
	err = l.leftovers()
	for _, what := range []string{"left a mount", "left a loop device", "left a network namespace", "left process"} {
		require.ErrorContains(t, err, what)
	}
	require.NoError(t, l.close(t.Context()))
	require.NoError(t, l.leftovers())
	require.False(t, p.running())
	_, err = l.procs.start(exec.Command("true"))
	require.Error(t, err, "the run is over")
}
