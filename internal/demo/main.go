// Command demo shows, on one machine, what Trivet is for: three servers keep a volume by Raft, the
// leader is killed in the middle of a copy, and nothing that was flushed is lost; a flipped bit is
// repaired, and removed files come back from a snapshot. It speaks CSI as Kubernetes would and uses the
// trivet command as an operator would. It needs root, /dev/fuse and loop devices, works in a temporary
// folder and leaves nothing behind. Its last line is `demo: ok`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// limit is how long the whole demo may take; it takes less than one.
const limit = 10 * time.Minute

func main() {
	binary := flag.String("trivet", "bin/trivet", "the trivet binary")
	keep := flag.Bool("keep", false, "keep the folder with the servers' logs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, limit)
	err := run(ctx, *binary, *keep)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		os.Exit(1)
	}
	fmt.Println("demo: ok")
}

func run(ctx context.Context, binary string, keep bool) error {
	if err := checkMachine(); err != nil {
		return err
	}
	binary, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	if _, err := os.Stat(binary); err != nil {
		return fmt.Errorf("%w; build it first with `make build`", err)
	}
	dir, err := os.MkdirTemp("", "trivet-demo-")
	if err != nil {
		return err
	}
	d := &demo{dir: dir, binary: binary, sums: map[string]string{}}
	err = d.story(ctx)
	err = errors.Join(err, d.leaveNothing())
	if err != nil {
		return fmt.Errorf("%w\n  the servers' logs are in %s", err, dir)
	}
	if keep {
		fmt.Printf("     the servers' logs are in %s\n", dir)
		return nil
	}
	return os.RemoveAll(dir)
}

func checkMachine() error {
	if os.Geteuid() != 0 {
		return errors.New("needs root: it mounts filesystems; try `sudo make demo`")
	}
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("needs %s: %w; load the kernel module (modprobe fuse, modprobe loop)", path, err)
		}
		f.Close()
	}
	return nil
}
