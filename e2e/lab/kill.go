package lab

import (
	"context"
	"errors"
	"fmt"
)

// KillNode cuts the power of a node: every process on it is killed at once, and its mounts and its network are gone
// with them. It returns when they are. The node does not come back; [Down] clears up as ever.
func (c *Cluster) KillNode(ctx context.Context, name string) error {
	n, err := c.node(name)
	if err != nil {
		return err
	}
	if err := n.Init.kill(); err != nil {
		return fmt.Errorf("kill node %s: %w", name, err)
	}
	return until(ctx, "node "+name+" is dead", func(context.Context) (bool, error) {
		if n.Init.alive() {
			return false, errors.New("its init still runs")
		}
		return true, nil
	})
}

// KillDaemon kills the kubelet, or containerd, of a node, once it runs. The node's init starts it again a second later, as
// systemd would.
func (c *Cluster) KillDaemon(ctx context.Context, nodeName, daemon string) error {
	n, err := c.node(nodeName)
	if err != nil {
		return err
	}
	var victim process
	err = until(ctx, daemon+" of node "+nodeName+" runs", func(context.Context) (bool, error) {
		all, err := marked(c.dir)
		if err != nil {
			return false, err
		}
		for _, p := range all {
			if p.Name == daemon && descendsFromAny(p.PID, map[int]bool{n.Init.PID: true}) {
				victim = p
				return true, nil
			}
		}
		return false, nil
	})
	if err != nil {
		return err
	}
	if err := victim.kill(); err != nil {
		return err
	}
	return until(ctx, daemon+" of node "+nodeName+" is dead", func(context.Context) (bool, error) {
		return !victim.alive(), nil
	})
}
