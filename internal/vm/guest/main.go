// Command guest is process 1 of a test guest (package vm): it mounts what programs expect, inserts the
// kernel modules of the plan, runs its commands, and ends the machine with the number of failures.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet/internal/vm/plan"
)

// mounts of the guest. /dev/shm and /tmp are what shared memory and t.TempDir need.
var mounts = []struct{ fstype, target, options string }{
	{"proc", "/proc", ""},
	{"sysfs", "/sys", ""},
	{"devtmpfs", "/dev", ""},
	{"tmpfs", "/dev/shm", "size=80%"},
	{"tmpfs", "/tmp", "size=80%"},
	{"tmpfs", "/run", "size=80%"},
	{"fusectl", "/sys/fs/fuse/connections", ""},
}

func main() {
	fails := run(context.Background(), os.Stdout)
	if err := leave(fails); err != nil {
		fmt.Fprintln(os.Stdout, "guest:", err)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // the other end takes this for a failure
}

// run does all that the plan says and returns how much of it failed.
func run(ctx context.Context, out io.Writer) (fails int) {
	began := time.Now()
	report := func(what string, err error) {
		if err != nil {
			fails++
			fmt.Fprintf(out, "guest: %s: %v\n", what, err)
		}
	}
	for _, m := range mounts {
		report("mount "+m.target, mount(m.fstype, m.target, m.options))
	}
	p, err := readPlan()
	report("plan", err)
	for _, file := range p.Modules {
		report("insert "+file, insert(file))
	}
	for _, env := range append([]string{"PATH=/bin", "HOME=/root", "TMPDIR=/tmp"}, p.Env...) {
		report("environment", setenv(env))
	}
	fmt.Fprintf(out, "guest: up after %.1f s\n", uptime(began).Seconds())
	for _, argv := range p.Commands {
		began := time.Now()
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Stdout, cmd.Stderr = out, out
		report(argv[0], cmd.Run())
		fmt.Fprintf(out, "guest: %s: %.1f s\n", argv[0], time.Since(began).Seconds())
	}
	return fails
}

// mount mounts one filesystem. One that the kernel does not have (fusectl) is left out.
func mount(fstype, target, options string) error {
	if err := os.MkdirAll(target, 0o755); errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		return nil // inside sysfs: the kernel would have made it
	} else if err != nil {
		return err
	}
	return unix.Mount(fstype, target, fstype, 0, options)
}

func readPlan() (plan.Plan, error) {
	var p plan.Plan
	b, err := os.ReadFile(plan.Path)
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return p, fmt.Errorf("decode: %w", err)
	}
	if len(p.Commands) == 0 {
		return p, errors.New("no commands")
	}
	return p, nil
}

func insert(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return unix.InitModule(b, "")
}

func setenv(assignment string) error {
	for i := range len(assignment) {
		if assignment[i] == '=' {
			return os.Setenv(assignment[:i], assignment[i+1:])
		}
	}
	return fmt.Errorf("%q has no '='", assignment)
}

// uptime is how long the kernel has run; if it does not say, how long we have.
func uptime(began time.Time) time.Duration {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return time.Since(began)
	}
	return time.Duration(info.Uptime) * time.Second
}

// leave ends the machine with the number of failures. It only returns if that does not work.
func leave(fails int) error {
	port, err := os.OpenFile("/dev/port", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = port.WriteAt([]byte{byte(plan.ExitPass + min(fails, plan.FailsMax))}, plan.ExitPort)
	return errors.Join(err, port.Close())
}
