// Command vmtest runs Go tests in a guest (package vm): it builds the init and the packages' test
// binaries, boots, and exits with 0 if all passed.
//
//	vmtest -kernel FOLDER [-run REGEXP] [-limit 30m] [-v] PACKAGE...
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet/internal/vm"
)

// Modules and programs that the tests of this repository ask for. ext4 asks for crc32c by an alias,
// which a guest without modprobe cannot follow; it is in the list for that.
var (
	modules  = []string{"crc32c_generic", "ext4", "loop", "nbd", "ublk_drv"}
	programs = []string{"mkfs.ext4", "fsck.ext4", "resize2fs", "fstrim", "blkdiscard"}
)

// guest is the package of the init.
const guest = "github.com/trivet-csi/trivet/internal/vm/guest"

type options struct {
	kernel   string
	run      string
	limit    time.Duration
	verbose  bool
	overlay  string
	packages []string
}

func main() {
	var o options
	flag.StringVar(&o.kernel, "kernel", "", "folder of an unpacked kernel package; fetch.sh prints one")
	flag.StringVar(&o.run, "run", "", "run only tests that match, as go test -run")
	flag.DurationVar(&o.limit, "limit", 30*time.Minute, "end the guest after this long, and fail")
	flag.BoolVar(&o.verbose, "v", false, "print each test")
	flag.StringVar(&o.overlay, "overlay", "", "build the tests with this overlay, as go build -overlay")
	flag.Parse()
	o.packages = flag.Args()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	fails, err := run(ctx, &o)
	stop()
	switch {
	case err != nil:
		fmt.Fprintf(os.Stderr, "vmtest: %v\n", err)
		os.Exit(1)
	case fails > 0:
		fmt.Fprintf(os.Stderr, "vmtest: %d failed\n", fails)
		os.Exit(1)
	}
}

// run builds, boots and returns how many packages, or steps before them, failed.
func run(ctx context.Context, o *options) (int, error) {
	if len(o.packages) == 0 {
		return 0, fmt.Errorf("name the packages to test")
	}
	kernel, err := vm.FindKernel(o.kernel)
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "trivet-vmtest-")
	if err != nil {
		return 0, err
	}
	defer func() { _ = os.RemoveAll(dir) }() // temporary, and nobody reads it any more
	im := &vm.Image{
		Kernel: kernel, Init: filepath.Join(dir, "init"), Modules: modules, Programs: programs, Files: map[string]string{},
		Env: []string{"TRIVET_VM_GUEST=1"}, // what may be missing elsewhere must be there
	}
	if err := goTool(ctx, "build", "-ldflags=-s -w", "-o", im.Init, guest); err != nil {
		return 0, err
	}
	for i, pkg := range o.packages {
		name := fmt.Sprintf("%d-%s.test", i, path.Base(pkg))
		args := []string{"test", "-c", "-ldflags=-s -w", "-o", filepath.Join(dir, name)}
		if o.overlay != "" {
			args = append(args, "-overlay", o.overlay)
		}
		if err := goTool(ctx, append(args, pkg)...); err != nil {
			return 0, err
		}
		binary := "/tests/" + name
		im.Files[binary] = filepath.Join(dir, name)
		im.Commands = append(im.Commands, o.command(binary))
	}
	fmt.Fprintf(os.Stdout, "vmtest: kernel %s\n", kernel.Release)
	began := time.Now()
	fails, err := vm.Boot(ctx, im, os.Stdout, o.limit)
	fmt.Fprintf(os.Stdout, "vmtest: guest ran for %.0f s\n", time.Since(began).Seconds())
	return fails, err
}

// command runs one test binary. It ends itself before the guest's end, to say what hangs.
func (o *options) command(binary string) []string {
	argv := []string{binary, "-test.timeout=" + (o.limit * 4 / 5).String(), "-test.run=" + o.run}
	if o.verbose {
		argv = append(argv, "-test.v")
	}
	return argv
}

// goTool runs the go command; binaries are static, for the guest has no libraries for them.
func goTool(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go %s: %w", args[0], err)
	}
	return nil
}
