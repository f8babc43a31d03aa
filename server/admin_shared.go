package server

import (
	"context"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// sharedRequest is a request that may ask for an attachment which another node may write beside.
type sharedRequest interface {
	GetShared() bool
	GetWith() string
}

// attachFor returns how a request wants a volume attached to this node, if it is not as one of many readers.
func (a *admin) attachFor(r sharedRequest) (func(ctx context.Context, name string) (meta.Volume, error), error) {
	switch {
	case r.GetShared():
		return a.attachBeside(trivet.NodeID(r.GetWith())), nil
	case r.GetWith() != "":
		return nil, fmt.Errorf("attach together with node %s: only what is shared can be: %w", r.GetWith(), trivet.ErrInvalid)
	}
	return a.attach, nil
}

// attachBeside attaches a volume to this node as one of two that both write; with names the other, if not empty.
func (a *admin) attachBeside(with trivet.NodeID) func(ctx context.Context, name string) (meta.Volume, error) {
	return func(ctx context.Context, name string) (meta.Volume, error) {
		v, err := a.find(ctx, name)
		if err != nil {
			return meta.Volume{}, err
		}
		return a.s.controller.AttachBeside(ctx, v.ID, a.s.cfg.Node, with)
	}
}
