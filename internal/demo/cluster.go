package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/trivet-csi/trivet/internal/csicall"
)

// server is one `trivet server` process and a connection to its CSI socket.
type server struct {
	name    string
	address string
	cmd     *exec.Cmd
	exited  chan struct{} // closed once the process is gone
	conn    *grpc.ClientConn
}

type demo struct {
	dir     string
	binary  string
	servers []*server
	keeper  *exec.Cmd
	step    int
	volume  *csi.Volume
	sums    map[string]string // file -> SHA-256 of what was flushed
}

// say prints a numbered step; the lines that belong to it follow by note.
func (d *demo) say(format string, args ...any) {
	d.step++
	fmt.Printf("%2d.  %s\n", d.step, fmt.Sprintf(format, args...))
}

func note(format string, args ...any) { fmt.Printf("     %s\n", fmt.Sprintf(format, args...)) }

// trivet runs the trivet command and returns what it printed.
func (d *demo) trivet(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, d.binary, args...)
	var out, problem bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problem
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("trivet %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(problem.String()))
	}
	return out.Bytes(), nil
}

// ask runs a trivet command against server s with JSON output and decodes the answer into v.
func (d *demo) ask(ctx context.Context, s *server, v any, args ...string) error {
	args = append(args, "--server", s.address, "--certs", filepath.Join(d.dir, "client"), "-o", "json")
	out, err := d.trivet(ctx, args...)
	if err != nil {
		return err
	}
	return json.Unmarshal(out, v)
}

// patience is how long something may take on a machine that is busy with something else for some seconds: a volume has
// no leader then, and a node no lease.
const patience = time.Minute

// askAgain is ask until it works. What is asked for must be the same when it is asked for twice.
func (d *demo) askAgain(ctx context.Context, s *server, v any, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return until(ctx, "trivet "+strings.Join(args, " ")+" works", func() (bool, error) {
		err := d.ask(ctx, s, v, args...)
		return err == nil, err
	})
}

func (d *demo) makeCerts(ctx context.Context, names []string) error {
	ca := filepath.Join(d.dir, "ca")
	commands := [][]string{
		{"cert", "ca", "--dir", ca},
		{"cert", "client", "demo", "--ca", ca, "--dir", filepath.Join(d.dir, "client")},
	}
	for _, name := range names {
		commands = append(commands, []string{"cert", "node", name, "--ca", ca, "--dir", filepath.Join(d.dir, name, "certs")})
	}
	for _, c := range commands {
		if _, err := d.trivet(ctx, c...); err != nil {
			return err
		}
	}
	return nil
}

// freeAddresses returns n addresses that nobody listens on just now, of a loopback address that hardly anybody else
// uses: a server that starts again finds its own free.
func freeAddresses(ctx context.Context, n int) (addresses []string, err error) {
	var lc net.ListenConfig
	host := net.IPv4(127, byte(1+rand.IntN(254)), byte(rand.IntN(256)), byte(1+rand.IntN(254))).String()
	for range n {
		l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, "0"))
		if err != nil {
			return nil, err
		}
		defer l.Close() //nolint:errcheck // at the end, or two could be the same; it was only to find a free port
		addresses = append(addresses, l.Addr().String())
	}
	return addresses, nil
}

// start runs the process of s and connects to its CSI socket.
func (d *demo) start(s *server) error {
	home := filepath.Join(d.dir, s.name)
	logFile, err := os.OpenFile(filepath.Join(d.dir, s.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close() // the process has its own descriptor
	args := []string{
		"server", "--node", s.name, "--data", filepath.Join(home, "data"), "--listen", s.address, "--advertise", s.address,
		"--certs", filepath.Join(home, "certs"), "--csi", "unix://" + s.socket(d), "--run-dir", filepath.Join(home, "run"),
		"--attach", "fuse", "--keeper", d.keeperSocket(), "--detach-on-stop",
	}
	for _, peer := range d.servers {
		if peer != s {
			args = append(args, "--seed", peer.address)
		}
	}
	s.cmd = exec.Command(d.binary, args...) //nolint:noctx // ended by kill and stop, which wait for it
	s.cmd.Stdout, s.cmd.Stderr = logFile, logFile
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the demo, which ends its servers itself
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		_ = cmd.Wait() // how it ended is in its log; that it ended is what matters here
		close(exited)
	}(s.cmd, s.exited)
	if s.conn == nil {
		s.conn, err = grpc.NewClient("unix://"+s.socket(d), grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithUnaryInterceptor(csicall.Again))
	}
	return err
}

func (s *server) socket(d *demo) string { return filepath.Join(d.dir, s.name, "csi.sock") }

func (s *server) running() bool {
	if s.cmd == nil {
		return false
	}
	select {
	case <-s.exited:
		return false
	default:
		return true
	}
}

// end sends sig and waits until the process is gone, at last by SIGKILL.
func (s *server) end(sig syscall.Signal) error {
	if !s.running() {
		return nil
	}
	if err := s.cmd.Process.Signal(sig); err != nil {
		return err
	}
	select {
	case <-s.exited:
		return nil
	case <-time.After(patience):
		_ = s.cmd.Process.Kill()
		<-s.exited
		return fmt.Errorf("server %s did not end on %v within %v", s.name, sig, patience)
	}
}

func (d *demo) server(name string) *server {
	for _, s := range d.servers {
		if s.name == name {
			return s
		}
	}
	return nil
}

// until polls ask until it reports true; the error of the last try explains a time-out.
func until(ctx context.Context, what string, ask func() (bool, error)) error {
	var last error
	for {
		done, err := ask()
		if done {
			return nil
		}
		if err != nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("waiting until %s: %w", what, ctx.Err()), last)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
