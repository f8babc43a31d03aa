package main

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
)

// Names of the yardsticks, which goals are ratios to.
const (
	nameRaw   = "raw file"
	nameRaw3x = "raw3x"
)

// system is something to measure.
type system struct {
	name      string
	target    target
	processes []process
	stop      func() error // nil: nothing to stop
	reason    string       // why it is not measured; empty: it is
}

func absent(name, format string, args ...any) *system {
	return &system{name: name, reason: fmt.Sprintf(format, args...)}
}

// fileArgs are fio's arguments for files or devices around the page cache.
func fileArgs(args ...string) []string {
	return append([]string{"--ioengine=libaio", "--direct=1"}, args...)
}

func nbdTarget(uri string) target {
	return target{args: []string{"--ioengine=nbd", "--uri=" + uri}, copies: 1}
}

// startRaw is three files: one as it is, and all three in parallel, as three copies would be.
func startRaw(dir string) []*system {
	one := fileArgs("--filename=" + filepath.Join(dir, "raw-0"))
	three := fileArgs("--directory="+dir, "--filename_format=raw-$jobnum")
	return []*system{
		{name: nameRaw, target: target{args: one, copies: 1}},
		{name: nameRaw3x, target: target{args: three, copies: 3}},
	}
}

// startServer runs an NBD server of somebody else's with one copy in a file.
func startServer(ctx context.Context, name, dir string, sizeBytes int64, command func(file, socket string) []string,
) *system {
	file, socket := filepath.Join(dir, name+".data"), filepath.Join(dir, name+".sock")
	args := command(file, socket)
	path, err := exec.LookPath(args[0])
	if err != nil {
		return absent(name, "%s is not installed", args[0])
	}
	if err := makeFile(file, sizeBytes); err != nil {
		return absent(name, "%v", err)
	}
	c, err := startChild(name, filepath.Join(dir, name+".log"), path, args[1:]...)
	if err != nil {
		return absent(name, "%v", err)
	}
	if err := awaitSocket(ctx, socket, c); err != nil {
		return absent(name, "%v", errors.Join(err, c.stop()))
	}
	return &system{
		name: name, target: nbdTarget("nbd+unix:///?socket=" + socket),
		processes: []process{{name, c.cmd.Process.Pid}}, stop: c.stop,
	}
}

// startQEMU serves a file around the page cache, with the kernel's asynchronous I/O: its quickest way.
func startQEMU(ctx context.Context, dir string, sizeBytes int64) *system {
	return startServer(ctx, "qemu-nbd", dir, sizeBytes, func(file, socket string) []string {
		return []string{
			"qemu-nbd", "--format=raw", "--persistent", "--cache=none", "--aio=native", "--shared=4", "--socket=" + socket, file,
		}
	})
}

// startNBDKit serves a file through the page cache, which is all that its file plugin can do.
func startNBDKit(ctx context.Context, dir string, sizeBytes int64) *system {
	return startServer(ctx, "nbdkit", dir, sizeBytes, func(file, socket string) []string {
		return []string{"nbdkit", "--foreground", "--unix", socket, "file", file}
	})
}

func makeFile(path string, sizeBytes int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(sizeBytes), f.Close())
}

// child is a process that we started. It dies with us.
type child struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
}

func startChild(name, log, path string, args ...string) (*child, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()                    //nolint:errcheck // the child has its own
	cmd := exec.Command(path, args...) //nolint:noctx // ended by stop, which waits
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us, who end it ourselves
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{name: name, cmd: cmd, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(c.done)
	}()
	return c, nil
}

// stop ends the process, kindly at first.
func (c *child) stop() error {
	const patience = 30 * time.Second
	_ = c.cmd.Process.Signal(syscall.SIGTERM) // it may be gone
	select {
	case <-c.done:
		return nil
	case <-time.After(patience):
		_ = c.cmd.Process.Kill()
		<-c.done
		return fmt.Errorf("%s (process %d) did not end on SIGTERM within %s", c.name, c.cmd.Process.Pid, patience)
	}
}

// awaitSocket waits until somebody listens, or the child is gone.
func awaitSocket(ctx context.Context, socket string, c *child) error {
	const patience, every = time.Minute, 20 * time.Millisecond
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var d net.Dialer
	for {
		conn, err := d.DialContext(ctx, "unix", socket)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-c.done:
			return fmt.Errorf("%s ended at once; see its log", c.name)
		case <-ctx.Done():
			return fmt.Errorf("%s does not listen: %w", c.name, err)
		case <-time.After(every):
		}
	}
}
