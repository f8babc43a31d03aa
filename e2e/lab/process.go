package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// markVariable is in the environment of every process that the lab starts outside of containers, with
// the lab's folder as value. It finds those that were started just before their starter was killed
// and so are not in the state. Containers do not have it; they die with their node's PID namespace.
const markVariable = "TRIVET_E2E_LAB"

// process names a process so that a later one with the same number is not taken for it.
type process struct {
	Name  string `json:"name"`
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot, field 22 of /proc/PID/stat
}

// identify returns the process that has the number now.
func identify(name string, pid int) (process, error) {
	_, start, err := readStat(pid)
	if err != nil {
		return process{}, err
	}
	return process{Name: name, PID: pid, Start: start}, nil
}

// alive says whether the process runs; one that has died and waits for its parent does not.
func (p process) alive() bool {
	if p.PID <= 0 {
		return false
	}
	status, start, err := readStat(p.PID)
	return err == nil && start == p.Start && status != 'Z' && status != 'X'
}

// kill sends SIGKILL. It is no error when the process is gone.
func (p process) kill() error {
	if !p.alive() {
		return nil
	}
	if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("kill %s (process %d): %w", p.Name, p.PID, err)
	}
	return nil
}

func readStat(pid int) (status byte, start uint64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("read process %d: %w", pid, err)
	}
	return parseStat(text)
}

// parseStat reads field 3 (state) and 22 (starttime) of /proc/PID/stat. Field 2 is the program's name
// in parentheses and may itself hold spaces and parentheses, so counting starts behind the last one.
func parseStat(text []byte) (status byte, start uint64, err error) {
	at := bytes.LastIndexByte(text, ')')
	if at < 0 {
		return 0, 0, fmt.Errorf("process status %q: has no name", text)
	}
	fields := strings.Fields(string(text[at+1:]))
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("process status %q: too short", text)
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("process status: start time: %w", err)
	}
	return fields[0][0], start, nil
}

// marked returns the processes that carry the mark of the lab in dir.
func marked(dir string) ([]process, error) {
	pids, err := allPIDs()
	if err != nil {
		return nil, err
	}
	mark := []byte(markVariable + "=" + dir)
	var found []process
	for _, pid := range pids {
		if pid == os.Getpid() {
			continue // Down may run below a helper's environment
		}
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil {
			continue // it ended meanwhile, or is a kernel thread
		}
		for v := range bytes.SplitSeq(env, []byte{0}) {
			if !bytes.Equal(v, mark) {
				continue
			}
			if p, err := identify(processName(pid), pid); err == nil && p.alive() {
				found = append(found, p)
			}
			break
		}
	}
	return found, nil
}

func processName(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "?"
	}
	return strings.TrimSpace(string(text))
}

func allPIDs() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// starter starts processes that outlive this program.
type starter struct {
	dir string // the lab's folder, for the mark and the logs
}

// start runs a program in a session of its own, its output in logs/NAME.log. files are its
// descriptors from 3 on; flags are namespaces to make for it.
func (s starter) start(name string, argv []string, env []string, flags uintptr, files ...*os.File) (process, error) {
	path := filepath.Join(s.dir, "logs", name+".log")
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return process{}, fmt.Errorf("open log of %s: %w", name, err)
	}
	defer log.Close()                         // the process has its own descriptor
	cmd := exec.Command(argv[0], argv[1:]...) //nolint:noctx // it must outlive this program; Down ends it
	cmd.Env = append(os.Environ(), env...)
	cmd.Env = append(cmd.Env, markVariable+"="+s.dir)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: flags}
	if err := cmd.Start(); err != nil {
		return process{}, fmt.Errorf("start %s: %w", name, err)
	}
	p, err := identify(name, cmd.Process.Pid)
	if err != nil {
		_ = cmd.Process.Kill() // without its identity nobody would find it again
		_ = cmd.Wait()
		return process{}, fmt.Errorf("start %s: it ended at once: %w", name, err)
	}
	// While this program lives it is the parent, and a dead child stays until its parent asks.
	go func() { _ = cmd.Wait() }()
	return p, nil
}

// output runs a command to its end and returns what it printed; the error holds what it complained of.
func output(ctx context.Context, argv ...string) (string, error) {
	return outputOf(exec.CommandContext(ctx, argv[0], argv[1:]...))
}

func outputOf(cmd *exec.Cmd) (string, error) {
	var out, problem bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problem
	cmd.WaitDelay = 5 * time.Second // a grandchild that holds the pipe must not hold us
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(problem.String())
		if said == "" {
			said = strings.TrimSpace(out.String())
		}
		return out.String(), fmt.Errorf("%s: %w: %s", strings.Join(shortArgs(cmd.Args), " "), err, said)
	}
	return out.String(), nil
}

// shortArgs keeps an error readable: the first dozen words, the program without its folder.
func shortArgs(args []string) []string {
	short := append([]string{filepath.Base(args[0])}, args[1:]...)
	if len(short) > 12 {
		short = append(short[:12:12], "...")
	}
	return short
}

// until polls ask until it reports true. A time-out tells what was waited for and the last error.
func until(ctx context.Context, what string, ask func(ctx context.Context) (bool, error)) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		done, err := ask(ctx)
		if done {
			return nil
		}
		if err != nil && ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("wait until %s: %w", what, context.Cause(ctx)), last)
		case <-tick.C:
		}
	}
}
