package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Kubectl runs kubectl as an administrator and returns its standard output. The error holds what it
// wrote to its standard error.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return outputOf(c.KubectlCommand(ctx, args...))
}

// KubectlInput is Kubectl with stdin as standard input, for `apply -f -`.
func (c *Cluster) KubectlInput(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := c.KubectlCommand(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	return outputOf(cmd)
}

// KubectlCommand returns the command that [Cluster.Kubectl] runs, for callers that want to run it in
// the background or give it other files.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.cache.program("kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "KUBECACHEDIR="+filepath.Join(c.dir, "kubectl"))
	return cmd
}

// ProgramsDir is the folder with the lab's own programs, kubectl among them.
func (c *Cluster) ProgramsDir() string { return string(c.cache) }

// NodePID is the process number, seen from the host, of the init of a node: entering its namespaces
// is entering the node, and killing it is cutting the node's power.
func (c *Cluster) NodePID(name string) (int, error) {
	n, err := c.node(name)
	if err != nil {
		return 0, err
	}
	if !n.Init.alive() {
		return 0, fmt.Errorf("node %s: its init (process %d) does not run", name, n.Init.PID)
	}
	return n.Init.PID, nil
}

// Exec runs a program of the node's root folder in all namespaces of the node and returns its
// standard output. The error holds what it wrote to its standard error.
func (c *Cluster) Exec(ctx context.Context, name string, argv ...string) (string, error) {
	pid, err := c.NodePID(name)
	if err != nil {
		return "", err
	}
	out, err := output(ctx, enterNode(pid, argv...)...)
	if err != nil {
		return out, fmt.Errorf("on node %s: %w", name, err)
	}
	return out, nil
}

func enterNode(pid int, argv ...string) []string {
	return append([]string{
		"nsenter", "--target", strconv.Itoa(pid), "--mount", "--uts", "--net", "--pid", "--",
	}, argv...)
}

// LoadImage gives an image to the containerd of every node, under the name that the archive itself
// carries: RepoTags of a docker archive, or the annotation io.containerd.image.name of an OCI archive.
func (c *Cluster) LoadImage(ctx context.Context, archive string) error {
	if _, err := os.Stat(archive); err != nil {
		return fmt.Errorf("load image: %w", err)
	}
	if err := c.ctrAll(ctx, "images", "import", archive); err != nil {
		return fmt.Errorf("load image %s: %w", archive, err)
	}
	return nil
}

// ctrAll is ctr on every node at the same time.
func (c *Cluster) ctrAll(ctx context.Context, args ...string) error {
	errs := make(chan error, len(c.nodes))
	for _, n := range c.nodes {
		go func() {
			_, err := c.ctr(ctx, n, args...)
			errs <- err
		}()
	}
	var all []error
	for range c.nodes {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

// ctr talks to the containerd of a node, in Kubernetes' namespace.
func (c *Cluster) ctr(ctx context.Context, n node, args ...string) (string, error) {
	argv := append([]string{c.cache.deb("usr/bin/ctr"), "-a", n.containerdSocket(), "-n", "k8s.io"}, args...)
	out, err := output(ctx, argv...)
	if err != nil {
		return out, fmt.Errorf("on node %s: %w", n.Name, err)
	}
	return out, nil
}

// pod is what is needed of a Pod object.
type pod struct {
	Spec struct {
		NodeName string `json:"nodeName"`
	} `json:"spec"`
	Status struct {
		Containers []struct {
			Name string `json:"name"`
			ID   string `json:"containerID"`
		} `json:"containerStatuses"`
		InitContainers []struct {
			Name string `json:"name"`
			ID   string `json:"containerID"`
		} `json:"initContainerStatuses"`
	} `json:"status"`
}

// containerID returns containerd's identifier of a pod's container, sidecars included.
func (p pod) containerID(name string) string {
	for _, s := range append(p.Status.Containers, p.Status.InitContainers...) {
		if s.Name == name {
			return strings.TrimPrefix(s.ID, "containerd://")
		}
	}
	return ""
}

// ContainerPID returns the number, seen from the host, of the main process of a container.
func (c *Cluster) ContainerPID(ctx context.Context, namespace, podName, container string) (int, error) {
	text, err := c.Kubectl(ctx, "get", "pod", podName, "--namespace", namespace, "--output", "json")
	if err != nil {
		return 0, err
	}
	var p pod
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return 0, fmt.Errorf("read pod %s/%s: %w", namespace, podName, err)
	}
	id := p.containerID(container)
	if id == "" {
		return 0, fmt.Errorf("pod %s/%s: has no running container %s", namespace, podName, container)
	}
	n, err := c.node(p.Spec.NodeName)
	if err != nil {
		return 0, err
	}
	return c.taskPID(ctx, n, id)
}

// taskPID asks containerd for the main process of a container and translates the number, which is
// one of the node's PID namespace, into the host's.
func (c *Cluster) taskPID(ctx context.Context, n node, id string) (int, error) {
	out, err := c.ctr(ctx, n, "tasks", "list")
	if err != nil {
		return 0, err
	}
	inner := ""
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == id && f[2] == "RUNNING" {
			inner = f[1]
		}
	}
	if inner == "" {
		return 0, fmt.Errorf("container %s on node %s: has no running task", id, n.Name)
	}
	pids, err := cgroupPIDs(n.cgroup(), id)
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		if numbers := namespacePIDs(pid); len(numbers) > 1 && numbers[1] == inner {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("container %s on node %s: none of the processes %v is its main process %s",
		id, n.Name, pids, inner)
}

// namespacePIDs are the numbers of a process in the PID namespaces around it, the host's first.
func namespacePIDs(pid int) []string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(text)) {
		if list, ok := strings.CutPrefix(line, "NSpid:"); ok {
			return strings.Fields(list)
		}
	}
	return nil
}

// KillContainer sends SIGKILL to the main process of a container, as the kernel would for want of
// memory. nodeName must be the pod's node, as a safeguard against killing another.
func (c *Cluster) KillContainer(ctx context.Context, nodeName, namespace, podName, container string) error {
	n, err := c.node(nodeName)
	if err != nil {
		return err
	}
	pid, err := c.ContainerPID(ctx, namespace, podName, container)
	if err != nil {
		return err
	}
	if !descendsFromAny(pid, map[int]bool{n.Init.PID: true}) {
		return fmt.Errorf("kill container %s of pod %s: its process %d does not run on node %s",
			container, podName, pid, nodeName)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill container %s of pod %s: process %d: %w", container, podName, pid, err)
	}
	return nil
}
