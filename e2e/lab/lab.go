// Package lab runs a real Kubernetes on one machine: etcd, an API server, a controller manager and a
// scheduler as plain processes, and nodes that each have their own mount, UTS, network and PID
// namespace, root folder, containerd and kubelet. Nothing is imitated: pods are containers, volumes
// are mounts, and admission, RBAC and certificates are those of any cluster.
//
// Two things are missing on purpose: kube-proxy (only headless Services and the API server's address
// work) and a registry (images come from archives, see [Cluster.LoadImage]).
//
// A cluster outlives the program that called [Up]; [Down] removes it from what is recorded in its
// folder, and proves that nothing is left. One machine runs one lab at a time, because bridge,
// addresses and cgroups have fixed names. Everything needs root.
//
// A program that calls [Up] must call [Hook] first thing in main: the lab starts helpers from the
// program's own executable.
package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// DefaultDir is where a lab lives unless told otherwise.
const DefaultDir = "/var/tmp/trivet-e2e"

// dirLenMax keeps the longest socket below a node's root within the 107 bytes of a socket address.
const dirLenMax = 50

// Config says what [Up] makes.
type Config struct {
	// Dir holds everything of the cluster: state, logs, certificates, the root folders of the nodes.
	// Absolute, at most 50 bytes, on a filesystem that overlayfs accepts as upper layer (ext4, xfs).
	Dir string
	// Cache is the folder of binaries that build.sh made; see [FindCache].
	Cache string
	// Nodes are the nodes' names; empty means n1, n2, n3. At most 100.
	Nodes []string
	// Zones are the values of topology.kubernetes.io/zone, one a node; empty means z1, z2, ...
	Zones []string
	// SSH lets root into the nodes with the key of [Cluster.SSHKey], and gives them a systemctl that stops and starts
	// their kubelet.
	SSH bool
	// Log is told of each step; nil means silence.
	Log *slog.Logger
}

// withDefaults fills in what was left out.
func (c Config) withDefaults() Config {
	if c.Dir == "" {
		c.Dir = DefaultDir
	}
	if len(c.Nodes) == 0 {
		c.Nodes = []string{"n1", "n2", "n3"}
	}
	if len(c.Zones) == 0 {
		for i := range c.Nodes {
			c.Zones = append(c.Zones, fmt.Sprintf("z%d", i+1))
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// nodeName is narrower than a DNS label, so that a name fits a host name and a cgroup alike.
var nodeName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

// Validate returns an error that names the first bad field.
func (c Config) Validate() error {
	switch {
	case !filepath.IsAbs(c.Dir) || filepath.Clean(c.Dir) == "/":
		return fmt.Errorf("lab folder %q: must be absolute and not the root", c.Dir)
	case len(c.Dir) > dirLenMax:
		return fmt.Errorf("lab folder %s: has %d bytes, at most %d, because of the sockets below it",
			c.Dir, len(c.Dir), dirLenMax)
	case len(c.Nodes) > nodesMax:
		return fmt.Errorf("lab of %d nodes: at most %d", len(c.Nodes), nodesMax)
	case len(c.Zones) != len(c.Nodes):
		return fmt.Errorf("lab: %d zones for %d nodes", len(c.Zones), len(c.Nodes))
	}
	seen := map[string]bool{}
	for _, n := range c.Nodes {
		if !nodeName.MatchString(n) || seen[n] {
			return fmt.Errorf("node name %q: must be a short DNS label, and each only once", n)
		}
		seen[n] = true
	}
	return nil
}

// Cluster is a running lab. Its methods may be called concurrently.
type Cluster struct {
	dir   string
	cache cache
	log   *slog.Logger
	nodes []node
	ssh   bool
}

// Up makes a cluster and returns once every node is Ready and pods can start. A cluster that was left
// in the folder is removed first. On error everything it had started is removed again, except the
// logs in the folder logs.
func Up(ctx context.Context, cfg Config) (*Cluster, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if err := checkMachine(); err != nil {
		return nil, err
	}
	c := &Cluster{dir: filepath.Clean(cfg.Dir), cache: cache(cfg.Cache), log: cfg.Log, nodes: planNodes(cfg),
		ssh: cfg.SSH}
	if err := c.cache.check(); err != nil {
		return nil, err
	}
	if err := Down(ctx, c.dir, cfg.Log); err != nil {
		return nil, fmt.Errorf("remove the lab that was there: %w", err)
	}
	if err := checkFree(c.dir); err != nil {
		return nil, err
	}
	if err := c.up(ctx); err != nil {
		//nolint:contextcheck // what was made must be removed even when ctx is what ended
		return nil, errors.Join(fmt.Errorf("%w\n  logs: %s", err, c.logDir()), c.downAfterFailure())
	}
	return c, nil
}

func (c *Cluster) downAfterFailure() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	return c.Down(ctx)
}

// Open returns the cluster that runs in dir, made by an earlier [Up], perhaps of another program.
// It fails when there is none.
func Open(dir string, log *slog.Logger) (*Cluster, error) {
	st, err := loadState(dir)
	if err != nil {
		return nil, err
	}
	if st == nil || !st.Complete {
		return nil, fmt.Errorf("no lab is up in %s; start one with `lab up`", dir)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Cluster{dir: dir, cache: cache(st.Cache), log: log, nodes: st.Nodes}, nil
}

// Down ends the cluster; see the function [Down].
func (c *Cluster) Down(ctx context.Context) error { return Down(ctx, c.dir, c.log) }

// Kubeconfig is the path of a kubeconfig of an administrator (group system:masters).
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.dir, "pki", "admin.kubeconfig") }

// Dir is the folder of the cluster.
func (c *Cluster) Dir() string { return c.dir }

// Nodes are the names of the nodes, in the order of Config.
func (c *Cluster) Nodes() []string {
	names := make([]string, 0, len(c.nodes))
	for _, n := range c.nodes {
		names = append(names, n.Name)
	}
	return names
}

// NodeRoot is the folder that the node sees as its root; files below it can be read and written from
// outside, mounts made in the node are not seen there. It fails for an unknown node.
func (c *Cluster) NodeRoot(name string) (string, error) {
	n, err := c.node(name)
	return n.Root, err
}

func (c *Cluster) node(name string) (node, error) {
	for _, n := range c.nodes {
		if n.Name == name {
			return n, nil
		}
	}
	return node{}, fmt.Errorf("node %s: not one of this lab's, which are %v", name, c.Nodes())
}

func (c *Cluster) logDir() string { return filepath.Join(c.dir, "logs") }

func checkMachine() error {
	if os.Geteuid() != 0 {
		return errors.New("the lab needs root: it makes namespaces, mounts and cgroups")
	}
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("the lab needs %s: %w; load the kernel module (modprobe fuse, modprobe loop)", path, err)
		}
	}
	return nil
}
