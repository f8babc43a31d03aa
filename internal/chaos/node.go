package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

const (
	// ioTimeout is what the servers are given: short enough that a run sees requests give up.
	ioTimeout = 10 * time.Second

	// stopWait is how long a server may take to stop in good order.
	stopWait = 20 * time.Second

	// restartPause is how long the supervisor waits before it starts a server again, as systemd would.
	restartPause = time.Second
)

// node is a machine of the run: a namespace, a filesystem and one `trivet server`, which is started again
// when it ends by itself, as an init system would do.
type node struct {
	index   int
	name    string
	space   string // network namespace
	home    string // logs, certificates, sockets; not on the filesystem that is broken
	address string
	mounted int // whose filesystem is at store, -1 = none; owned by the nemesis

	mu         sync.Mutex
	supervised bool
	hidden     bool // paused, frozen or cut off: the node is not ready for anything new
	frozen     bool
	proc       *process
	crashesN   int // how often the server ended by itself
}

func (n *node) store() string   { return filepath.Join(n.home, "store") }
func (n *node) image() string   { return filepath.Join(n.home, "disk.img") }
func (n *node) disk() string    { return filepath.Join(n.store(), "disk") }
func (n *node) logPath() string { return filepath.Join(n.home, "server.log") }

// inSpace makes a command in the network namespace of n. nsenter becomes the command, so that the id of the
// process is that of the command; ip netns exec would bring a mount namespace of its own, in which
// filesystems stay busy.
func (n *node) inSpace(name string, args ...string) []string {
	return append([]string{"nsenter", "--net=" + spacePath(n.space), "--", name}, args...)
}

// launch starts the server of n once, with the disk given.
func (l *lab) launch(n *node, disk string) (*process, error) {
	log, err := os.OpenFile(n.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the process has its own descriptor
	fmt.Fprintf(log, "--- started at %s\n", time.Now().Format(time.RFC3339Nano))
	args := []string{
		"server", "--node", n.name, "--data", filepath.Join(n.store(), "data"), "--disk", disk, "--listen", n.address,
		"--advertise", n.address, "--certs", filepath.Join(n.home, "certs"), "--run-dir", filepath.Join(n.home, "run"),
		"--io-timeout", ioTimeout.String(),
	}
	for _, peer := range l.nodes {
		if peer != n {
			args = append(args, "--seed", peer.address)
		}
	}
	line := n.inSpace(l.binary, args...)
	cmd := exec.Command(line[0], line[1:]...) //nolint:noctx // ended by the nemesis and by lab.close
	cmd.Stdout, cmd.Stderr = log, log
	return l.procs.start(cmd)
}

// start starts the server and keeps it running until stop or kill.
func (l *lab) start(n *node) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc.running() {
		return nil
	}
	p, err := l.launch(n, n.disk())
	if err != nil {
		return fmt.Errorf("start %s: %w", n.name, err)
	}
	n.supervised, n.proc = true, p
	go l.supervise(n, p)
	return nil
}

// supervise starts the server again when p has ended and nobody wanted it to.
func (l *lab) supervise(n *node, p *process) {
	for {
		<-p.exited
		n.mu.Lock()
		wanted := n.supervised && n.proc == p
		if wanted {
			n.crashesN++
		}
		n.mu.Unlock()
		if !wanted {
			return
		}
		time.Sleep(restartPause)
		n.mu.Lock()
		if !n.supervised || n.proc != p {
			n.mu.Unlock()
			return
		}
		next, err := l.launch(n, n.disk())
		if err != nil { // the run is over
			n.mu.Unlock()
			return
		}
		n.proc, p = next, next
		n.mu.Unlock()
	}
}

// unsupervise leaves the server as it is from now on and returns its process.
func (n *node) unsupervise() *process {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.supervised = false
	return n.proc
}

// end ends the server for good, by sig.
func (n *node) end(sig syscall.Signal) bool { return n.unsupervise().end(sig, stopWait) }

// process returns the process of the server as it is now.
func (n *node) process() *process {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.proc
}

// up reports whether the server runs and answers, which an operator would see.
func (n *node) up() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.hidden && n.proc.running()
}

func (n *node) hide(hidden bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hidden = hidden
}

// freeze holds every write to the filesystem of n until thaw.
func (n *node) freeze(ctx context.Context) error {
	n.mu.Lock()
	n.frozen = true // before the deed: thaw must come in any case
	n.mu.Unlock()
	_, err := run(ctx, "", "fsfreeze", "-f", n.store())
	return err
}

func (n *node) thaw(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.frozen {
		return nil
	}
	n.frozen = false
	_, err := run(ctx, "", "fsfreeze", "-u", n.store())
	return err
}

func (n *node) fillPath() string { return filepath.Join(n.store(), "filling") }

// fill takes every free byte of the filesystem of n.
func (n *node) fill() (err error) {
	f, err := os.Create(n.fillPath())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	off := int64(0)
	for chunk := int64(256 << 20); chunk >= blockBytes; {
		switch err := syscall.Fallocate(int(f.Fd()), 0, off, chunk); {
		case err == nil:
			off += chunk
		case errors.Is(err, syscall.ENOSPC):
			chunk /= 2
		case errors.Is(err, syscall.EINTR):
		default:
			return fmt.Errorf("fill %s: %w", n.store(), err)
		}
	}
	return nil
}
