package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// processes records every long-lived process of the run by its id, so that none outlives it and none but
// ours is ever ended.
type processes struct {
	mu     sync.Mutex
	all    []*process
	closed bool
}

// process is one child and how it ended.
type process struct {
	cmd    *exec.Cmd
	began  string        // start time as in /proc, which tells it from a later process with its id
	exited chan struct{} // closed once it is gone
	err    error         // how it ended; readable once exited is closed
}

func newProcesses() *processes { return &processes{} }

// start runs cmd in a process group of its own.
func (ps *processes) start(cmd *exec.Cmd) (*process, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.closed {
		return nil, errors.New("the run is over")
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us, who end what we started
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, began: startTime(cmd.Process.Pid), exited: make(chan struct{})}
	ps.all = append(ps.all, p)
	go func() {
		p.err = cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// startTime returns field 22 of /proc/PID/stat (proc_pid_stat(5)), or nothing when there is no such process.
func startTime(pid int) string {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(text), ") ") // the name may hold spaces
	fields := strings.Fields(rest)
	const afterName = 22 - 3
	if len(fields) <= afterName {
		return ""
	}
	return fields[afterName]
}

// close kills every process that is left and waits for it.
func (ps *processes) close() error {
	ps.mu.Lock()
	ps.closed = true
	all := ps.all
	ps.mu.Unlock()
	var errs []error
	for _, p := range all {
		if p.running() {
			_ = p.signal(syscall.SIGKILL) // gone meanwhile, or it shows below
		}
	}
	for _, p := range all {
		select {
		case <-p.exited:
		case <-time.After(stepTimeout):
			errs = append(errs, fmt.Errorf("process %d does not end on SIGKILL", p.cmd.Process.Pid))
		}
	}
	return errors.Join(errs...)
}

func (ps *processes) leftovers() error {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	var errs []error
	for _, p := range ps.all {
		if pid := p.cmd.Process.Pid; p.began != "" && startTime(pid) == p.began {
			errs = append(errs, fmt.Errorf("left process %d: %s", pid, strings.Join(p.cmd.Args, " ")))
		}
	}
	return errors.Join(errs...)
}

func (p *process) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

func (p *process) signal(sig syscall.Signal) error { return p.cmd.Process.Signal(sig) }

// end sends sig and waits until the process is gone, at last by SIGKILL. It reports whether sig was enough.
func (p *process) end(sig syscall.Signal, wait time.Duration) bool {
	if !p.running() {
		return true
	}
	_ = p.signal(sig) // gone meanwhile
	select {
	case <-p.exited:
		return true
	case <-time.After(wait):
		_ = p.signal(syscall.SIGKILL)
		<-p.exited
		return false
	}
}
