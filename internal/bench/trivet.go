package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// cluster is three `trivet server` processes on loopback, with mutual TLS and a disk folder each.
type cluster struct {
	binary, dir string
	addresses   []string
	children    []*child
}

const clusterN = 3

func (c *cluster) trivet(ctx context.Context, args ...string) ([]byte, error) {
	var out, problem bytes.Buffer
	cmd := exec.CommandContext(ctx, c.binary, args...)
	cmd.Stdout, cmd.Stderr = &out, &problem
	if err := cmd.Run(); err != nil {
		said := strings.TrimPrefix(firstLine(problem.String()), "trivet: ")
		return nil, fmt.Errorf("trivet %s: %w: %s", strings.Join(args[:2], " "), err, said)
	}
	return out.Bytes(), nil
}

// ask runs a command against the first server.
func (c *cluster) ask(ctx context.Context, args ...string) ([]byte, error) {
	return c.trivet(ctx, append(args, "--server", c.addresses[0], "--certs", c.path("client"))...)
}

func (c *cluster) path(names ...string) string {
	return filepath.Join(append([]string{c.dir}, names...)...)
}

// startCluster starts the servers, bears the cluster and waits until all three vote.
func startCluster(ctx context.Context, binary, dir string, extra []string) (c *cluster, err error) {
	c = &cluster{binary: binary, dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.stop())
		}
	}()
	if err := c.makeCerts(ctx); err != nil {
		return c, err
	}
	for range clusterN {
		address, err := freeAddress(ctx)
		if err != nil {
			return c, err
		}
		c.addresses = append(c.addresses, address)
	}
	for i := range clusterN {
		name := nodeName(i)
		args := []string{
			"server", "--node", name, "--data", c.path(name, "data"), "--certs", c.path(name, "certs"),
			"--listen", c.addresses[i], "--advertise", c.addresses[i], "--run-dir", c.path(name, "run"), "--log-level", "warn",
		}
		for k, address := range c.addresses {
			if k != i {
				args = append(args, "--seed", address)
			}
		}
		child, err := startChild("trivet "+name, c.path(name+".log"), binary, append(args, extra...)...)
		if err != nil {
			return c, err
		}
		c.children = append(c.children, child)
	}
	return c, c.bear(ctx)
}

func nodeName(i int) string { return "n" + strconv.Itoa(i+1) }

func (c *cluster) makeCerts(ctx context.Context) error {
	commands := [][]string{
		{"cert", "ca", "--dir", c.path("ca")},
		{"cert", "client", "bench", "--ca", c.path("ca"), "--dir", c.path("client")},
	}
	for i := range clusterN {
		commands = append(commands,
			[]string{"cert", "node", nodeName(i), "--ca", c.path("ca"), "--dir", c.path(nodeName(i), "certs")})
	}
	for _, args := range commands {
		if _, err := c.trivet(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// bear runs cluster init once the first server answers, and waits for the others to join and vote.
func (c *cluster) bear(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	born := false
	return until(ctx, func() error {
		if !born {
			if _, err := c.ask(ctx, "cluster", "init"); err != nil {
				return err
			}
			born = true
		}
		out, err := c.ask(ctx, "node", "list", "-o", "json")
		if err != nil {
			return err
		}
		var nodes []struct {
			State string `json:"state"`
			Role  string `json:"role"`
			Disks []any  `json:"disks"`
		}
		if err := json.Unmarshal(out, &nodes); err != nil {
			return err
		}
		ready := 0
		for _, n := range nodes {
			if n.State == "Up" && n.Role != "Learner" && len(n.Disks) > 0 {
				ready++
			}
		}
		if ready < clusterN {
			return fmt.Errorf("%d of %d nodes are up and vote", ready, clusterN)
		}
		return nil
	})
}

// until repeats ask until it returns nil or ctx ends.
func until(ctx context.Context, ask func() error) error {
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func freeAddress(ctx context.Context) (string, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

func (c *cluster) stop() error {
	var errs []error
	for _, child := range c.children {
		errs = append(errs, child.stop())
	}
	return errors.Join(errs...)
}

func (c *cluster) processes() []process {
	var ps []process
	for _, child := range c.children {
		ps = append(ps, process{child.name, child.cmd.Process.Pid})
	}
	return ps
}

// volume makes a volume and shows it as both systems of a cache mode: over NBD, and as a kernel device.
// They share the volume, so it is filled once. A mode that this version does not know leaves both out.
func (c *cluster) volume(ctx context.Context, mode string, sizeBytes, cacheMiB int64) []*system {
	nbdName, kernelName := "Trivet, NBD, "+mode, "Trivet, kernel, "+mode
	name := strings.ToLower(mode)
	create := []string{"volume", "create", name, "--size", strconv.FormatInt(sizeBytes, 10)}
	cache := "cacheSize=" + strconv.FormatInt(cacheMiB<<20, 10)
	_, err := c.ask(ctx, append(create, "--param", "cacheMode="+mode, "--param", cache)...)
	if err != nil && mode == modeThrough { // before there was a cache everything was written through
		_, err = c.ask(ctx, create...)
	}
	if err != nil {
		return []*system{absent(nbdName, "%v", err), absent(kernelName, "%v", err)}
	}
	return []*system{c.serve(ctx, nbdName, name), c.attach(ctx, kernelName, name)}
}

// The cache modes that are measured.
const (
	modeThrough = "writeThrough"
	modeBack    = "writeBack"
)

// serve runs `trivet volume serve` and waits for the URI.
func (c *cluster) serve(ctx context.Context, name, volume string) *system {
	args := []string{
		"volume", "serve", volume, "--socket", c.path(volume + ".sock"),
		"--server", c.addresses[0], "--certs", c.path("client"),
	}
	r, w, err := os.Pipe()
	if err != nil {
		return absent(name, "%v", err)
	}
	defer r.Close()                        //nolint:errcheck // only read
	cmd := exec.Command(c.binary, args...) //nolint:noctx // ended by stop
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		return absent(name, "%v", errors.Join(err, w.Close()))
	}
	serving := &child{name: "trivet volume serve", cmd: cmd, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // it says why itself
		close(serving.done)
	}()
	_ = w.Close() // the child has its own
	uri, err := readURI(ctx, r)
	if err != nil {
		return absent(name, "%v", errors.Join(err, serving.stop()))
	}
	return &system{name: name, target: nbdTarget(uri), processes: c.processes(), stop: serving.stop}
}

// readURI waits for the line "serving URI".
func readURI(ctx context.Context, r io.ReadCloser) (string, error) {
	defer context.AfterFunc(ctx, func() { _ = r.Close() })() // ends the scan
	lines := bufio.NewScanner(r)
	said := ""
	for lines.Scan() {
		if uri, ok := strings.CutPrefix(lines.Text(), "serving "); ok {
			return uri, nil
		}
		said += lines.Text() + "\n"
	}
	return "", fmt.Errorf("trivet volume serve ended: %s", firstLine(said))
}

// attach makes the volume a kernel block device.
func (c *cluster) attach(ctx context.Context, name, volume string) *system {
	out, err := c.ask(ctx, "volume", "attach", volume)
	if err != nil {
		return absent(name, "%v", err)
	}
	return &system{
		name: name, target: target{args: fileArgs("--filename=" + firstLine(string(out))), copies: 1},
		processes: c.processes(),
		stop: func() error {
			_, err := c.ask(context.WithoutCancel(ctx), "volume", "detach", volume)
			return err
		},
	}
}
