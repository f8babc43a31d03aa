package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	// attemptMin is the least time that one try gets. A try that is cut off too early is repeated,
	// which is harmless but costs a log entry.
	attemptMin = 2 * time.Second

	retryPause = 20 * time.Millisecond
)

// Propose applies a command, from any node, and returns its result. When the catalogue refuses the
// command, both the error and Result.Err are the refusal, with its sentinel. ErrUnavailable when
// ctx ends before an answer came: the command may yet be applied, once or more often.
//
// A command is sent again after a lost answer, so it can be applied twice. That is harmless by the
// design of the commands (see meta.Command), which is why there is no table of requests here as
// there is on the data path.
func (c *Catalogue) Propose(ctx context.Context, cmd meta.Command) (meta.Result, error) {
	if cmd.Audited() && cmd.Time.IsZero() {
		cmd.Time, cmd.By = time.Now(), c.cfg.Node
	}
	data, err := cmd.Encode()
	if err != nil {
		return meta.Result{Err: err}, err
	}
	var res meta.Result
	err = c.atLeader(ctx, cmd.Op(), func(ctx context.Context, g *raftgroup.Group) (err error) {
		res, err = proposeTo(ctx, g, data)
		return err
	}, func(ctx context.Context, leader trivet.NodeID) error {
		reply, err := c.call(ctx, leader, transport.KindMetaPropose, request{op: opCommand, body: data}.encode())
		if err == nil {
			res, err = decodeResult(reply)
		}
		return err
	})
	if err != nil {
		return meta.Result{}, err
	}
	return res, res.Err
}

// proposeTo proposes an encoded command on the leader.
func proposeTo(ctx context.Context, g *raftgroup.Group, data []byte) (meta.Result, error) {
	out, err := g.Propose(ctx, data)
	if err != nil {
		return meta.Result{}, err
	}
	res, ok := out.(meta.Result)
	if !ok {
		return meta.Result{}, fmt.Errorf("state machine returned %T: %w", out, trivet.ErrUnavailable)
	}
	return res, nil
}

// Read returns a state that holds every command whose Propose had returned, anywhere, before the
// call: this node's own copy, once the leader has said how far it must be. ErrUnavailable when ctx
// ends first.
func (c *Catalogue) Read(ctx context.Context) (*meta.State, error) {
	var state *meta.State
	err := c.atLeader(ctx, "read catalogue", func(_ context.Context, g *raftgroup.Group) error {
		if _, err := g.ReadGate(); err != nil {
			return err
		}
		state = c.Local()
		return nil
	}, func(ctx context.Context, leader trivet.NodeID) error {
		reply, err := c.call(ctx, leader, transport.KindMetaRead, request{op: opRead}.encode())
		if err != nil {
			return err
		}
		index, err := decodeIndex(reply)
		if err != nil {
			return err
		}
		state, err = c.machine.waitIndex(ctx, index)
		return err
	})
	return state, err
}

// AddMember lets a replica that Prepare made on a node into the meta group, first as a learner; the
// leader promotes it once it has caught up, if there are fewer voters than VoterMax. Again: nil. ErrInvalid: the node
// was forgotten.
// REQUIRES: that the replica's node is open and can be reached at the address in the book.
func (c *Catalogue) AddMember(ctx context.Context, node trivet.NodeID, replica trivet.ReplicaID) error {
	add := addMember{Node: node, Replica: replica}
	if err := add.validate(); err != nil {
		return err
	}
	here := func(ctx context.Context, g *raftgroup.Group) error { return c.addMember(ctx, g, add) }
	return c.atLeader(ctx, add.String(), here, func(ctx context.Context, leader trivet.NodeID) error {
		body, err := add.encode()
		if err == nil {
			_, err = c.call(ctx, leader, transport.KindMetaPropose, request{op: opAddMember, body: body}.encode())
		}
		return err
	})
}

// call sends one request. What goes wrong on the way, or on a leader that stops, is worth another
// try: only ErrInvalid, a refusal, is final.
func (c *Catalogue) call(ctx context.Context, to trivet.NodeID, kind transport.Kind, body []byte) ([]byte, error) {
	reply, err := c.cfg.Network.Call(ctx, to, transport.Message{Kind: kind, Group: trivet.MetaGroup, Body: body})
	if err == nil || errors.Is(err, trivet.ErrInvalid) {
		return reply.Body, err
	}
	return nil, fmt.Errorf("ask leader %s: %v: %w", to, err, trivet.ErrUnavailable)
}

// atLeader runs here when this node leads, or remote at the leader, until one of them gets through
// or ctx ends.
func (c *Catalogue) atLeader(ctx context.Context, what string,
	here func(context.Context, *raftgroup.Group) error, remote func(context.Context, trivet.NodeID) error,
) error {
	last := errors.New("not a member of the meta group yet")
	for {
		g, err := c.awaitOpen(ctx)
		if err == nil {
			changed := g.Changed()
			if err = c.try(ctx, g, here, remote); err == nil {
				return nil
			}
			if !errors.Is(err, trivet.ErrNotLeader) && !errors.Is(err, trivet.ErrUnavailable) {
				return fmt.Errorf("%s: %w", what, err)
			}
			last = err
			select {
			case <-changed:
			case <-time.After(retryPause):
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: no answer (%v), last: %v: %w", what, context.Cause(ctx), last, trivet.ErrUnavailable)
		}
		if errors.Is(err, trivet.ErrClosed) {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
}

// try makes one try. Its own deadline is ErrUnavailable.
func (c *Catalogue) try(ctx context.Context, g *raftgroup.Group,
	here func(context.Context, *raftgroup.Group) error, remote func(context.Context, trivet.NodeID) error,
) error {
	ctx, cancel := context.WithTimeout(ctx, max(attemptMin, 4*c.cfg.Timing.Heartbeat))
	defer cancel()
	var err error
	switch st := g.Status(); {
	case st.IsLeader:
		err = here(ctx, g)
	case st.LeaderNode == "" || st.LeaderNode == c.cfg.Node:
		why := "no leader is known"
		if d := c.Damage(); d != "" {
			why += " (" + d + ")"
		}
		return fmt.Errorf("%s: %w", why, trivet.ErrUnavailable)
	default:
		err = remote(ctx, st.LeaderNode)
	}
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%v: %w", err, trivet.ErrUnavailable)
	}
	return err
}

// awaitOpen waits until this node is a member.
func (c *Catalogue) awaitOpen(ctx context.Context) (*raftgroup.Group, error) {
	c.mu.Lock()
	opened := c.opened
	c.mu.Unlock()
	select {
	case <-opened:
	case <-c.ended:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if g := c.running(); g != nil {
		return g, nil
	}
	return nil, trivet.ErrClosed
}

// handlePropose serves KindMetaPropose. It does not pass requests on: the sender looks for the
// leader again.
func (c *Catalogue) handlePropose(ctx context.Context, from trivet.NodeID, m transport.Message,
) (transport.Message, error) {
	g, err := c.leading()
	if err != nil {
		return transport.Message{}, err
	}
	r, err := decodeRequest(m.Body)
	if err != nil {
		return transport.Message{}, err
	}
	var reply []byte
	switch r.op {
	case opCommand:
		reply, err = c.serveCommand(ctx, g, from, r.body)
	case opAddMember:
		err = c.serveAddMember(ctx, g, from, r.body)
	default:
		err = fmt.Errorf("operation %d: %w", r.op, trivet.ErrInvalid)
	}
	return transport.Message{Body: reply}, err
}

func (c *Catalogue) serveCommand(ctx context.Context, g *raftgroup.Group, from trivet.NodeID, data []byte,
) ([]byte, error) {
	cmd, err := meta.Decode(data)
	if err != nil {
		return nil, err
	}
	// A new leader may not have applied yet what the sender relies on, its own registration perhaps.
	if _, err := g.ReadGate(); err != nil {
		return nil, err
	}
	if err := authorize(c.Local(), from, cmd); err != nil {
		c.log.Warn("command refused", "node", from, "command", cmd.Op(), "err", err)
		return nil, err
	}
	res, err := proposeTo(ctx, g, data)
	if err != nil {
		return nil, err
	}
	return encodeResult(res)
}

func (c *Catalogue) serveAddMember(ctx context.Context, g *raftgroup.Group, from trivet.NodeID, body []byte) error {
	add, err := decodeAddMember(body)
	if err != nil {
		return err
	}
	known := false
	for _, m := range g.Status().Members {
		known = known || m.Node == from
	}
	if !known {
		return fmt.Errorf("%s: node %s is no member itself: %w", add, from, trivet.ErrInvalid)
	}
	return c.addMember(ctx, g, add)
}

// handleRead serves KindMetaRead: the applied index that a reader must have reached. Everything that
// was acknowledged is applied on the leader before, and the gate, asked first, says that there is no
// other.
func (c *Catalogue) handleRead(_ context.Context, _ trivet.NodeID, m transport.Message) (transport.Message, error) {
	r, err := decodeRequest(m.Body)
	switch {
	case err == nil && r.op == opLogEnd:
		return c.serveLogEnd()
	case err != nil || r.op != opRead:
		return transport.Message{}, fmt.Errorf("read request of %d bytes: %w", len(m.Body), trivet.ErrInvalid)
	}
	g, err := c.leading()
	if err != nil {
		return transport.Message{}, err
	}
	if _, err := g.ReadGate(); err != nil {
		return transport.Message{}, err
	}
	index, _ := c.machine.Applied()
	return transport.Message{Body: encodeIndex(index)}, nil
}

// leading returns the group when this node leads it.
func (c *Catalogue) leading() (*raftgroup.Group, error) {
	g := c.running()
	if g == nil {
		return nil, fmt.Errorf("catalogue of %s is not open: %w", c.cfg.Node, trivet.ErrUnavailable)
	}
	if !g.Status().IsLeader {
		return nil, fmt.Errorf("catalogue of %s: %w", c.cfg.Node, trivet.ErrNotLeader)
	}
	return g, nil
}
