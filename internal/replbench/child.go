package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/trivet-csi/trivet"
)

// ask is one line to a child.
type ask struct {
	Do        string                   `json:"do"`
	Addresses map[trivet.NodeID]string `json:"addresses,omitempty"` // join
	File      string                   `json:"file,omitempty"`      // profile; empty = stop
	To        trivet.NodeID            `json:"to,omitempty"`        // yield
	N         int                      `json:"n,omitempty"`         // idle, unpark and so on: how many groups
	Load      load                     `json:"load,omitzero"`       // load
}

// answer is one line from a child.
type answer struct {
	Err     string `json:"err,omitempty"`
	Address string `json:"address,omitempty"` // hello
	Leads   bool   `json:"leads,omitempty"`   // status: both groups
	Idle    int    `json:"idle,omitempty"`    // status: further groups that have a leader
	Micros  int64  `json:"micros,omitempty"`  // transfer
	Applied uint64 `json:"applied,omitempty"` // where: of the volume's replica; fence: the epoch
	Bytes   uint64 `json:"bytes,omitempty"`   // where: received from the other nodes; memory: resident
	Usage   usage  `json:"usage,omitzero"`    // usage
	Result  result `json:"result,omitzero"`   // load
}

// usage is what a process has used so far.
type usage struct {
	CPUMicros  int64  `json:"cpuMicros"` // user and system
	Mallocs    uint64 `json:"mallocs"`
	AllocBytes uint64 `json:"allocBytes"`
}

func (u usage) minus(v usage) usage {
	return usage{u.CPUMicros - v.CPUMicros, u.Mallocs - v.Mallocs, u.AllocBytes - v.AllocBytes}
}

func (u usage) plus(v usage) usage {
	return usage{u.CPUMicros + v.CPUMicros, u.Mallocs + v.Mallocs, u.AllocBytes + v.AllocBytes}
}

// child is a process of ours.
type child struct {
	name string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Scanner
}

// startChild runs this program again. It dies with its parent.
func startChild(role, name string, o *options) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(o.dir, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close() //nolint:errcheck // the child has its own
	args := []string{"-role", role, "-name", name, "-dir", o.dir, fmt.Sprintf("-overlap=%t", o.overlap)}
	cmd := exec.Command(self, args...) //nolint:noctx // ended by close
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &child{name: name, cmd: cmd, in: in, out: bufio.NewScanner(out)}, nil
}

// call asks and waits for the answer.
func (c *child) call(a ask) (answer, error) {
	b, err := json.Marshal(a)
	if err != nil {
		return answer{}, err
	}
	if _, err := c.in.Write(append(b, '\n')); err != nil {
		return answer{}, fmt.Errorf("%s: %s: %w", c.name, a.Do, err)
	}
	if !c.out.Scan() {
		err := errors.Join(c.out.Err(), io.ErrUnexpectedEOF)
		return answer{}, fmt.Errorf("%s: %s: it ended (see its log): %w", c.name, a.Do, err)
	}
	var r answer
	if err := json.Unmarshal(c.out.Bytes(), &r); err != nil {
		return answer{}, fmt.Errorf("%s: %s: %w", c.name, a.Do, err)
	}
	if r.Err != "" {
		return answer{}, fmt.Errorf("%s: %s: %s", c.name, a.Do, r.Err)
	}
	return r, nil
}

// close ends the child, which stops when its standard input does.
func (c *child) close() error { return errors.Join(c.in.Close(), c.cmd.Wait()) }

// serve answers lines until there are no more.
func serve(in io.Reader, out io.Writer, do func(ask) (answer, error)) error {
	enc := json.NewEncoder(out)
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var a ask
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			return err
		}
		r, err := do(a)
		if err != nil {
			r.Err = err.Error()
		}
		if err := enc.Encode(r); err != nil {
			return err
		}
	}
	return lines.Err()
}
