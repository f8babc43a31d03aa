package keeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet"
)

const (
	spawnWait  = 10 * time.Second
	spawnCheck = 10 * time.Millisecond
)

// Spawn starts a keeper as a process of its own, by running exe with args, and waits until it answers at
// socket. It is in a session of its own, has no terminal and writes its log to socket + ".log". It stays
// in the control group of its parent: a supervisor that ends the whole group, as systemd does by default and
// the kubelet always does, ends it too (docs/kernel-devices.md).
func Spawn(exe string, args []string, socket string) error {
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return fmt.Errorf("start keeper: %w", err)
	}
	log, err := os.OpenFile(socket+".log", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("start keeper: %w", err)
	}
	defer log.Close()
	//nolint:forbidigo // it outlives whoever started it
	cmd := exec.CommandContext(context.Background(), exe, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start keeper: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // reaps it, should it end before us
	deadline := time.Now().Add(spawnWait)
	for {
		conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
		if err == nil {
			return conn.Close()
		}
		select {
		case werr := <-ended: // another may have been quicker: the next call finds it
			return fmt.Errorf("start keeper: it ended (%v), see %s.log: %w", werr, socket, trivet.ErrUnavailable)
		case <-time.After(spawnCheck):
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("start keeper: no answer in %v: %w", spawnWait, trivet.ErrUnavailable), err)
		}
	}
}
