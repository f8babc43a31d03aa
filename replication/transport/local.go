package transport

import (
	"bytes"
	"context"

	"github.com/trivet-csi/trivet"
)

// callLocal hands m to a handler of the same node, under a context that ends with ctx or lifetime.
// The body is copied because the handler owns what it receives, for longer than the call, and the
// caller owns what it sent once the call returns.
func callLocal(ctx, lifetime context.Context, f Handler, local trivet.NodeID, m Message) (Message, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(lifetime, cancel)()
	kind, group := m.Kind, m.Group
	m.Body = bytes.Clone(m.Body)
	reply, err := f(ctx, local, m)
	if err != nil {
		return Message{}, err
	}
	reply.Kind, reply.Group = kind, group
	return reply, nil
}
