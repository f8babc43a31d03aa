package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// restartDelay is how long a node waits before it starts a daemon that ended again, as systemd would.
const restartDelay = time.Second

// runNode is the init of a node: process 1 of its PID namespace. When it dies, however that comes, the
// kernel kills every process of the node and takes its mounts and its network down.
func runNode(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("a node's init takes one argument, not %d", len(args))
	}
	var spec nodeSpec
	if err := json.Unmarshal([]byte(args[0]), &spec); err != nil {
		return fmt.Errorf("read what to be: %w", err)
	}
	syscall.CloseOnExec(3)
	orders := os.NewFile(3, "orders")
	if err := expect(orders, sayConnected); err != nil {
		return err
	}
	logs, err := openLogs(spec)
	if err != nil {
		return err
	}
	if err := syscall.Sethostname([]byte(spec.Name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := enterRoot(spec); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644); err != nil {
		return fmt.Errorf("let the node forward its pods' packets: %w", err)
	}
	return superviseNode(ctx, spec, logs, orders)
}

// expect reads one order.
func expect(orders io.Reader, want byte) error {
	var got [1]byte
	if _, err := io.ReadFull(orders, got[:]); err != nil {
		return fmt.Errorf("wait for order %q: %w", want, err)
	}
	if got[0] != want {
		return fmt.Errorf("got order %q, want %q", got[0], want)
	}
	return nil
}

// openLogs opens the daemons' logs, which are outside of the root folder.
func openLogs(spec nodeSpec) (map[string]*os.File, error) {
	logs := map[string]*os.File{}
	for _, daemon := range []string{"containerd", "kubelet", "sshd"} {
		path := filepath.Join(spec.Logs, daemon+"-"+spec.Name+".log")
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return nil, fmt.Errorf("open log: %w", err)
		}
		logs[daemon] = f
	}
	return logs, nil
}

// mountStep is one call of mount(2).
type mountStep struct {
	source, target, kind string
	flags                uintptr
}

func mountAll(steps []mountStep) error {
	for _, m := range steps {
		if err := syscall.Mount(m.source, m.target, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mount %s (%s) on %s: %w", m.source, m.kind, m.target, err)
		}
	}
	return nil
}

// enterRoot makes the node's root folder the root of its mount namespace and leaves the host's behind.
//
// From then on every mount is shared (MS_SHARED) within the namespace, so that what a privileged pod
// mounts below /var/lib/kubelet reaches the kubelet and other pods; nothing reaches the host, because
// the namespace first became private.
func enterRoot(spec nodeSpec) error {
	in := func(path string) string { return filepath.Join(spec.Root, path) }
	const bindAll = syscall.MS_BIND | syscall.MS_REC
	const readOnly = syscall.MS_BIND | syscall.MS_REMOUNT | syscall.MS_RDONLY
	steps := []mountStep{
		{"", "/", "", syscall.MS_REC | syscall.MS_PRIVATE},
		{spec.Root, spec.Root, "", syscall.MS_BIND},
		{"/usr", in("usr"), "", bindAll},
		{"", in("usr"), "", readOnly},
		{spec.Cache, in(toolsDir), "", bindAll},
		{"", in(toolsDir), "", readOnly},
		{"/dev", in("dev"), "", bindAll},
		{"sysfs", in("sys"), "sysfs", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC},
		{"/sys/fs/cgroup", in("sys/fs/cgroup"), "", bindAll},
		{"proc", in("proc"), "proc", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC},
		// A machine has all of /run on a tmpfs. Here the host has to see containerd's socket in it.
		{"tmpfs", in("run/trivet"), "tmpfs", syscall.MS_NOSUID | syscall.MS_NODEV},
	}
	if spec.Authorized != "" {
		steps = append(steps, mountStep{in(nodeTools), in("usr/local/bin"), "", syscall.MS_BIND})
	}
	for _, name := range privateSysctls {
		steps = append(steps, mountStep{in("etc/sysctl/" + name), in(sysctlPath(name)), "", syscall.MS_BIND})
	}
	if err := mountAll(steps); err != nil {
		return err
	}
	if err := syscall.PivotRoot(spec.Root, in(".host")); err != nil {
		return fmt.Errorf("enter %s: %w", spec.Root, err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := syscall.Unmount("/.host", syscall.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the host's mounts: %w", err)
	}
	return errors.Join(os.Remove("/.host"), mountAll([]mountStep{{"", "/", "", syscall.MS_REC | syscall.MS_SHARED}}))
}

// supervisor keeps the daemons of a node running and reaps every orphan. Only superviseNode uses it.
type supervisor struct {
	argv    map[string][]string
	logs    map[string]*os.File
	running map[int]string // daemon by process
}

// superviseNode runs until the node is killed.
func superviseNode(ctx context.Context, spec nodeSpec, logs map[string]*os.File, orders io.Reader) error {
	argv, err := daemonArgs(spec)
	if err != nil {
		return err
	}
	s := &supervisor{argv: argv, logs: logs, running: map[int]string{}}
	dead := make(chan os.Signal, 1)
	signal.Notify(dead, syscall.SIGCHLD)
	start := make(chan string, 8)
	start <- "containerd"
	if spec.Authorized != "" {
		start <- "sshd"
	}
	ended := make(chan error, 1)
	go func() {
		if err := expect(orders, sayStartKubelet); err != nil {
			ended <- err
			return
		}
		waitSocket(ctx, "/run/containerd/containerd.sock")
		start <- "kubelet"
	}()
	for {
		select {
		case err := <-ended:
			return err
		case daemon := <-start:
			if !notStopped(daemon) {
				time.AfterFunc(restartDelay, func() { start <- daemon })
				continue
			}
			if err := s.start(daemon); err != nil {
				return err
			}
		case <-dead:
			for _, daemon := range s.reap() {
				if daemon == "kubelet" {
					if err := noteKubelet(0); err != nil {
						return err
					}
				}
				fmt.Fprintf(os.Stderr, "%s %s ended and is started again\n", time.Now().Format(time.RFC3339), daemon)
				time.AfterFunc(restartDelay, func() { start <- daemon })
			}
		}
	}
}

func daemonArgs(spec nodeSpec) (map[string][]string, error) {
	sshd, err := json.Marshal(sshSpec{Listen: net.JoinHostPort(spec.Address, "22"), Authorized: spec.Authorized})
	if err != nil {
		return nil, fmt.Errorf("encode ssh server: %w", err)
	}
	return map[string][]string{
		"sshd":       {"/proc/self/exe", string(sshd)},
		"containerd": {toolsDir + "/deb/usr/bin/containerd", "--config", "/etc/containerd.toml"},
		"kubelet": {
			toolsDir + "/kubelet", "--config=/etc/kubernetes/kubelet.json",
			"--kubeconfig=/etc/kubernetes/kubelet.kubeconfig", "--hostname-override=" + spec.Name,
			"--node-ip=" + spec.Address, "--node-labels=topology.kubernetes.io/zone=" + spec.Zone,
		},
	}, nil
}

func (s *supervisor) start(daemon string) error {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return fmt.Errorf("start %s: %w", daemon, err)
	}
	defer null.Close()
	tools := toolsDir + "/deb/usr/bin:" + toolsDir + "/deb/usr/sbin:"
	env := []string{strings.Replace(searchPath, "=", "="+tools, 1), "HOME=/root"}
	if daemon == "sshd" { // this very program
		env = append(env, helperVariable+"=ssh")
	}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, markVariable+"=") {
			env = append(env, v)
		}
	}
	p, err := os.StartProcess(s.argv[daemon][0], s.argv[daemon], &os.ProcAttr{
		Dir: "/", Env: env, Files: []*os.File{null, s.logs[daemon], s.logs[daemon]},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", daemon, err)
	}
	s.running[p.Pid] = daemon
	if daemon == "kubelet" {
		if err := noteKubelet(p.Pid); err != nil {
			return err
		}
	}
	return p.Release() // reap waits for it, as for every other process of the node
}

// reap takes every dead child and returns the daemons among them.
func (s *supervisor) reap() []string {
	var daemons []string
	for {
		pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return daemons
		}
		if daemon, ok := s.running[pid]; ok {
			delete(s.running, pid)
			daemons = append(daemons, daemon)
		}
	}
}

// waitSocket returns once somebody answers at a unix socket. It does not give up: a node whose
// containerd does not come up is of no use, and Up watches it.
func waitSocket(ctx context.Context, path string) {
	_ = until(ctx, "somebody answers at "+path, func(ctx context.Context) (bool, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", path)
		if err != nil {
			return false, err
		}
		return true, conn.Close()
	})
}
