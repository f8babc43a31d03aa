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
