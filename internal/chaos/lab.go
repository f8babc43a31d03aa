package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet/internal/loopdev"
)

const (
	imageBytes = 1 << 30 // sparse; what is written of it is far less

	// stepTimeout bounds one command of the set-up or of the teardown.
	stepTimeout = time.Minute

	// settleWait is how long the kernel may take to let go of a filesystem.
	settleWait = time.Minute

	hubName = "hub"
)

// lab is what the run has of the machine: namespaces, filesystems, processes. Everything in it has the name
// of the run or lies in its folder, and is recorded before it is made, so that close removes all of it and
// nothing else. The root namespace gets no interface and no address: the bridge has a namespace of its own.
type lab struct {
	dir    string // of the run: logs, images, sockets
	binary string // of trivet
	prefix string // of the namespaces
	spaces []string
	nodes  []*node
	procs  *processes
}

func newLab(dir, binary string, nodesN int) (*lab, error) {
	suffix := make([]byte, 4)
	if _, err := rand.Read(suffix); err != nil {
		return nil, err
	}
	l := &lab{
		dir: dir, binary: binary, prefix: "trivet-chaos-" + hex.EncodeToString(suffix) + "-", procs: newProcesses(),
	}
	for i := range nodesN {
		name := fmt.Sprintf("n%d", i+1)
		l.nodes = append(l.nodes, &node{
			index: i, name: name, space: l.prefix + name, home: filepath.Join(dir, name),
			address: nodeIP(i) + ":7400", mounted: -1,
		})
	}
	return l, nil
}

// run runs a command and returns what it wrote to stdout.
func run(ctx context.Context, stdin string, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us, who end what we started
	cmd.WaitDelay = time.Second
	var out, problem bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problem
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(problem.String()))
	}
	return out.Bytes(), nil
}

// openNetwork makes a namespace for the bridge and one for each node, with a cable between them.
func (l *lab) openNetwork(ctx context.Context) error {
	hub := l.prefix + hubName
	steps := [][]string{
		{"ip", "netns", "add", hub},
		{"ip", "-n", hub, "link", "add", "br0", "type", "bridge"},
		{"ip", "-n", hub, "link", "set", "br0", "up"},
	}
	l.spaces = append(l.spaces, hub)
	for i, n := range l.nodes {
		l.spaces = append(l.spaces, n.space)
		port := fmt.Sprintf("p%d", i)
		steps = append(steps, [][]string{
			{"ip", "netns", "add", n.space},
			{"ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", n.space},
			{"ip", "-n", hub, "link", "set", port, "master", "br0", "up"},
			{"ip", "-n", n.space, "link", "set", "lo", "up"},
			{"ip", "-n", n.space, "addr", "add", nodeIP(i) + "/24", "dev", "eth0"},
			{"ip", "-n", n.space, "link", "set", "eth0", "up"},
		}...)
	}
	for _, s := range steps {
		if _, err := run(ctx, "", s[0], s[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// cut replaces the packet filters of all nodes.
func (l *lab) cut(ctx context.Context, links map[link]bool, lossPercent int) error {
	var errs []error
	for i, n := range l.nodes {
		rules := ruleset(i, len(l.nodes), links, lossPercent)
		_, err := run(ctx, rules, "ip", "netns", "exec", n.space, "nft", "-f", "-")
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// openDisks gives each node a filesystem of its own, in a file.
func (l *lab) openDisks(ctx context.Context) error {
	for _, n := range l.nodes {
		if err := os.MkdirAll(n.store(), 0o700); err != nil {
			return err
		}
		f, err := os.Create(n.image())
		if err != nil {
			return err
		}
		err = errors.Join(f.Truncate(imageBytes), f.Close())
		if err != nil {
			return err
		}
		if _, err := run(ctx, "", "mkfs.ext4", "-q", "-F", "-m0", n.image()); err != nil {
			return err
		}
		if err := l.mount(ctx, n, n.index); err != nil {
			return err
		}
	}
	return nil
}

// mount mounts the filesystem of node of at the place of n.
func (l *lab) mount(ctx context.Context, n *node, of int) error {
	err := loopdev.With(l.nodes[of].image(), func(device string) error {
		_, err := run(ctx, "", "mount", "-t", "ext4", device, n.store())
		return err
	})
	if err != nil {
		return err
	}
	n.mounted = of
	return nil
}

func (l *lab) unmount(ctx context.Context, n *node) error {
	if n.mounted < 0 {
		return nil
	}
	// Whoever looks at new filesystems, such as udev, may keep it busy for a moment.
	ctx, cancel := context.WithTimeout(ctx, settleWait)
	defer cancel()
	err := until(ctx, n.store()+" is unmounted", func() (bool, error) {
		_, err := run(ctx, "", "umount", n.store())
		return err == nil, err
	})
	if err == nil {
		n.mounted = -1
	}
	return err
}

// loopsInUse lists the loop devices over files of the run. It reads sysfs, since losetup hangs for ever
// when some other program's device does.
func (l *lab) loopsInUse() ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // freed meanwhile
		}
		if strings.HasPrefix(string(text), l.dir+"/") {
			found = append(found, "/dev/"+strings.Split(file, "/")[3])
		}
	}
	return found, nil
}

// close ends every process of the run, unmounts its filesystems and removes its namespaces, then looks for
// anything left. It does all it can whatever fails, and may be called at any stage.
func (l *lab) close(ctx context.Context) error {
	var errs []error
	for _, n := range l.nodes {
		errs = append(errs, n.thaw(ctx)) // before the kill: a process that waits for a frozen filesystem cannot die
		n.unsupervise()
	}
	errs = append(errs, l.procs.close())
	for _, n := range l.nodes {
		errs = append(errs, l.unmount(ctx, n))
	}
	for _, space := range l.spaces {
		if _, err := os.Stat(spacePath(space)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		_, err := run(ctx, "", "ip", "netns", "delete", space)
		errs = append(errs, err)
	}
	ctx, cancel := context.WithTimeout(ctx, settleWait)
	defer cancel()
	errs = append(errs, until(ctx, "nothing is left", func() (bool, error) { // the kernel frees loop devices lazily
		err := l.leftovers()
		return err == nil, err
	}))
	return errors.Join(errs...)
}

func spacePath(space string) string { return filepath.Join("/run/netns", space) }

// leftovers reports what of the run is still there.
func (l *lab) leftovers() error {
	var errs []error
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	errs = append(errs, err)
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, l.dir+"/") || strings.Contains(line, l.prefix) {
			errs = append(errs, fmt.Errorf("left a mount: %s", strings.TrimSpace(line)))
		}
	}
	loops, err := l.loopsInUse()
	errs = append(errs, err)
	for _, dev := range loops {
		errs = append(errs, fmt.Errorf("left a loop device: %s", dev))
	}
	for _, space := range l.spaces {
		if _, err := os.Stat(spacePath(space)); err == nil {
			errs = append(errs, fmt.Errorf("left a network namespace: %s", space))
		}
	}
	return errors.Join(append(errs, l.procs.leftovers())...)
}
