package lab

import (
	"context"
	"errors"
)

// TagImage gives an image that every node has a second name, as an example or a test may ask for.
func (c *Cluster) TagImage(ctx context.Context, name, another string) error {
	var all []error
	for _, n := range c.nodes {
		_, err := c.ctr(ctx, n, "images", "tag", "--force", name, another)
		all = append(all, err)
	}
	return errors.Join(all...)
}
