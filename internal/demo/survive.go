package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	limitBytes = 8 << 20                // bytes/s that the live limit allows
	plotEvery  = 250 * time.Millisecond // one bar of the plot
	plotFree   = 6                      // bars without a limit, before and after
	plotHeld   = 12                     // bars with it, from the first that keeps to it
	plotSettle = 240                    // bars until then, at most: seconds of a busy machine, one bar of an idle one
	plotWidth  = 40                     // characters
	ratesFile  = "rates"                // what the plot writes, again and again
)

// startKeeper runs the process that keeps kernel devices while a server is away.
func (d *demo) startKeeper() error {
	logFile, err := os.OpenFile(filepath.Join(d.dir, "keeper.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()                                                     // the process has its own descriptor
	d.keeper = exec.Command(d.binary, "keeper", "--socket", d.keeperSocket()) //nolint:noctx // ended by leaveNothing
	d.keeper.Stdout, d.keeper.Stderr = logFile, logFile
	d.keeper.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return d.keeper.Start()
}

func (d *demo) keeperSocket() string { return filepath.Join(d.dir, "keeper.sock") }

func (d *demo) stopKeeper() error {
	if d.keeper == nil || d.keeper.Process == nil {
		return nil
	}
	if err := d.keeper.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	_ = d.keeper.Wait() // by the signal
	return nil
}

// barMost is what a bar may show under the limit, in bytes.
const barMost = limitBytes * int64(plotEvery) / int64(time.Second) * 5 / 4

// limitLive sets a limit while the pod writes, and takes it away again; the plot shows both.
func (d *demo) limitLive(ctx context.Context) error {
	d.say("the pod writes all the time; trivet volume set demo bandwidthLimit=8Mi, and then none again")
	rates := &rateMeter{path: filepath.Join(d.target(), ratesFile)}
	if err := rates.start(); err != nil {
		return err
	}
	free, held, after, heldFor, err := d.rates(ctx, rates)
	if err = errors.Join(err, rates.stop()); err != nil {
		return err
	}
	most := max(maxOf(free), maxOf(held), maxOf(after))
	plot("no limit", free, most)
	plot("8 MiB/s", held, most)
	plot("no limit", after, most)
	var sum int64
	held = held[max(0, len(held)-plotHeld):]
	for _, n := range held {
		sum += n
	}
	if allowed := int64(limitBytes*heldFor.Seconds()*5/4) + 2<<20; sum > allowed {
		return fmt.Errorf("with a limit of %d bytes/s the pod wrote %d bytes in %v, at most %d are right", limitBytes, sum,
			heldFor, allowed)
	}
	return os.Remove(rates.path)
}

// rates returns what was written in each interval without a limit, with one, and without one again, and how long the
// last plotHeld of those with one were together: longer than they should be when this process had to wait.
func (d *demo) rates(ctx context.Context, rates *rateMeter) (
	free, held, after []int64, heldFor time.Duration, err error,
) {
	set := func(limit string) error {
		var v volumeView
		return d.askAgain(ctx, d.servers[0], &v, "volume", "set", "demo", "bandwidthLimit="+limit)
	}
	free = rates.watch(ctx, plotFree)
	if err = set("8Mi"); err != nil {
		return nil, nil, nil, 0, err
	}
	for kept := 0; kept < 2 && len(held) < plotSettle; { // what was written before the node heard of it is on its way
		held = append(held, rates.watch(ctx, 1)...)
		if kept++; held[len(held)-1] > barMost {
			kept = 0
		}
	}
	note("it holds after %.2f s", float64(max(0, len(held)-2))*plotEvery.Seconds())
	began := time.Now()
	held = append(held, rates.watch(ctx, plotHeld)...)
	heldFor = time.Since(began)
	if err = set(""); err != nil {
		return nil, nil, nil, 0, err
	}
	after = rates.watch(ctx, plotFree)
	return free, held, after, heldFor, ctx.Err()
}

func plot(name string, bars []int64, most int64) {
	for i, n := range bars {
		if i > 0 {
			name = ""
		}
		rate := float64(n) / plotEvery.Seconds() / (1 << 20)
		note("%-9s %-*s %6.1f MiB/s", name, plotWidth, strings.Repeat("#", int(n*plotWidth/max(most, 1))), rate)
	}
}

func maxOf(bars []int64) int64 {
	var most int64
	for _, n := range bars {
		most = max(most, n)
	}
	return most
}

// killWriterDuringCopy kills the server under the pod that writes, in the middle, and starts it again.
func (d *demo) killWriterDuringCopy(ctx context.Context) error {
	writer := d.server("node-c")
	if ok, release := resumes(); !ok {
		d.say("(left out: Linux %s cannot keep a mount while its server restarts; 6.9 can)", release)
		return nil
	}
	d.say("copy %d MiB again; in the middle, SIGKILL node-c's own server, under the pod that writes, and start it again",
		copyBytes>>20)
	restarted := make(chan error, 1)
	begun := false
	pause, err := d.writeFile(ctx, "second", copyBytes, func(written int64) error {
		if written < copyBytes/2 || begun {
			return nil
		}
		begun = true
		go func() { // beside the copy, which is in the middle of a write then
			err := writer.end(syscall.SIGKILL)
			if err == nil {
				err = d.start(writer)
			}
			restarted <- err
		}()
		return nil
	})
	if err != nil {
		return fmt.Errorf("the copy broke: %w", err)
	}
	if err := <-restarted; err != nil {
		return err
	}
	note("the copy finished on the same mount; its longest pause was %d ms", pause.Milliseconds())
	return nil
}

// resumes reports whether this kernel can resend what a dead FUSE server has not answered (Linux 6.9).
func resumes() (bool, string) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return false, "unknown"
	}
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return false, release
	}
	return major > 6 || major == 6 && minor >= 9, release
}
