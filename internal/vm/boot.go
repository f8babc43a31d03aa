package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/trivet-csi/trivet/internal/vm/plan"
)

// qemu is the program that runs guests.
const qemu = "qemu-system-x86_64"

const (
	memoryMiB = 1536
	cpusN     = 2
)

// ErrNoVerdict is returned by Boot when the guest ended without telling how many commands failed: it
// panicked, ran out of time, or was never up.
var ErrNoVerdict = errors.New("guest ended without a verdict")

// Boot builds the image and runs it, streaming its console to out, for at most limit. It returns how
// many commands failed, or ErrNoVerdict. Nothing of the guest is left when it returns.
func Boot(ctx context.Context, im *Image, out io.Writer, limit time.Duration) (fails int, err error) {
	initrd, err := im.build(ctx)
	if err != nil {
		return 0, fmt.Errorf("build guest: %w", err)
	}
	dir, err := os.MkdirTemp("", "trivet-vm-")
	if err != nil {
		return 0, fmt.Errorf("boot guest: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	file := filepath.Join(dir, "initrd")
	if err := os.WriteFile(file, initrd, 0o600); err != nil {
		return 0, fmt.Errorf("boot guest: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemu, arguments(im.Kernel.Image, file)...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	if ctx.Err() != nil {
		return 0, fmt.Errorf("guest ran for %v: %w: %w", limit, context.Cause(ctx), ErrNoVerdict)
	}
	return verdict(cmd.ProcessState, err)
}

// verdict reads QEMU's exit code (plan.ExitPort). What the guest did not write is no verdict: 0 is a
// reset, in which a panic ends with -no-reboot, or a power-off; 1 is QEMU's own failure.
func verdict(state *os.ProcessState, err error) (int, error) {
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, fmt.Errorf("run %s: %w", qemu, err)
	}
	code := state.ExitCode()
	fails := code>>1 - plan.ExitPass
	if code < 0 || code&1 == 0 || fails < 0 || fails > plan.FailsMax {
		return 0, fmt.Errorf("%s: %v: %w", qemu, state, ErrNoVerdict)
	}
	return fails, nil
}

// arguments of QEMU: a machine of the fewest devices that has a serial port. No disk, no network, no
// reboot. One thread emulates all processors: with a thread each, one may run an instruction that another has
// patched already. Linux patches its own code with breakpoints as it starts, and panics at one that comes late
// ("Oops: int3", in one of forty starts beside other work).
func arguments(kernel, initrd string) []string {
	return []string{
		"-machine", "q35", "-accel", "tcg,thread=single", "-cpu", "max",
		"-smp", strconv.Itoa(cpusN), "-m", strconv.Itoa(memoryMiB),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-device", fmt.Sprintf("isa-debug-exit,iobase=%#x,iosize=1", plan.ExitPort),
		"-kernel", kernel, "-initrd", initrd,
		// panic=-1 resets at once; the rest saves time: QEMU has no watchdog for the clock to compare with, and
		// the guest's secrets are worth nothing.
		"-append", "console=ttyS0 quiet panic=-1 tsc=reliable random.trust_cpu=on mitigations=off nokaslr",
	}
}
