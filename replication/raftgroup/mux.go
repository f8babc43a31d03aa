package raftgroup

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// Mux hands the Raft messages of one Network to the groups of this node. One per Network: it
// registers the Raft kinds, and those can be registered only once.
type Mux struct {
	net    transport.Network
	deaths deaths
	images chan struct{} // one place per image that a replica of this node shows to another one
	pacer  pacer

	beatSlots chan struct{} // one per heartbeat of another node being handled

	mu     sync.RWMutex
	routes map[route]*Group
	list   []*Group // those of routes; made anew at each change, and not changed then
}

type route struct {
	group   trivet.VolumeID
	replica trivet.ReplicaID
}

// NewMux registers the Raft kinds on n. REQUIRES: before the first message may arrive.
func NewMux(n transport.Network) *Mux {
	m := &Mux{
		net: n, routes: make(map[route]*Group), images: make(chan struct{}, imagesProcessMax),
		pacer: pacer{began: time.Now()}, beatSlots: make(chan struct{}, beatHandlersMax),
	}
	m.deaths.last = make(map[trivet.NodeID]obituary)
	for _, k := range []transport.Kind{
		transport.KindAppendEntries, transport.KindRequestVote, transport.KindRequestPreVote, transport.KindTimeoutNow,
		transport.KindStanding, transport.KindTransfer,
		transport.KindFetch, transport.KindImageOpen, transport.KindImageRead, transport.KindImageClose,
		transport.KindLogEntry,
	} {
		n.Handle(k, m.handle)
	}
	n.Handle(transport.KindHeartbeats, m.handleBeats)
	if w, ok := n.(transport.Watcher); ok {
		w.Watch(m.presence) // for as long as the network lives
	}
	return m
}

// handle passes a message to the replica that it is addressed to; ErrNotFound when none runs here.
func (m *Mux) handle(ctx context.Context, from trivet.NodeID, msg transport.Message) (transport.Message, error) {
	m.mu.RLock()
	g := m.routes[route{msg.Group, msg.To}]
	m.mu.RUnlock()
	if g == nil {
		return transport.Message{}, fmt.Errorf("replica %s of group %s on %s: %w",
			msg.To, msg.Group, m.net.Local(), trivet.ErrNotFound)
	}
	body, err := g.receive(ctx, from, msg)
	if err != nil {
		return transport.Message{}, fmt.Errorf("replica %s of group %s on %s: %w",
			msg.To, msg.Group, m.net.Local(), err)
	}
	return transport.Message{From: msg.To, To: msg.From, Body: body}, nil
}

func (m *Mux) add(g *Group) error {
	if err := m.enter(g); err != nil {
		return err
	}
	m.setPace()
	return nil
}

func (m *Mux) enter(g *Group) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := route{g.cfg.Group, g.cfg.Replica}
	if m.routes[key] != nil {
		return fmt.Errorf("replica %s of group %s runs already: %w", key.replica, key.group, trivet.ErrInUse)
	}
	m.routes[key] = g
	m.list = append(slices.Clip(m.list), g)
	return nil
}

func (m *Mux) remove(g *Group) {
	m.mu.Lock()
	key := route{g.cfg.Group, g.cfg.Replica}
	ours := m.routes[key] == g
	if ours {
		delete(m.routes, key)
		m.list = slices.DeleteFunc(slices.Clone(m.list), func(x *Group) bool { return x == g })
	}
	m.mu.Unlock()
	if ours {
		m.setPace()
	}
}

// groups returns the groups of this node. The list must not be changed.
func (m *Mux) groups() []*Group {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.list
}
