package controller

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// Store is what the Controller needs of the catalogue. *Catalogue is one.
type Store interface {
	// Local returns this node's copy, which may lag. It never changes.
	Local() *meta.State

	// Changed returns a channel that is closed at the next change of Local. Take it before Local.
	Changed() <-chan struct{}

	// Read returns a state that holds everything committed before the call; ErrUnavailable if
	// nobody can say.
	Read(ctx context.Context) (*meta.State, error)

	// Propose applies a command. The error is the refusal of the catalogue, or ErrUnavailable when
	// the outcome is unknown.
	Propose(ctx context.Context, c meta.Command) (meta.Result, error)

	// Leader returns the node that leads the meta group, or "".
	Leader() trivet.NodeID
}

// recheckEvery is how often a waiting verb looks at what changes without a command: leases running
// out.
const recheckEvery = time.Second

// Controller offers the verbs on volumes. It keeps nothing but locks, so any number of Controllers,
// one per server, may work on one catalogue. Its methods are safe for concurrent use.
//
// Errors, for every method: ErrUnavailable when the outcome is unknown (no quorum, or ctx ended; the
// same call again goes on from there), ErrPending when another call works on the same volume.
type Controller struct {
	// Logger may be set before the first call. Nil discards.
	Logger *slog.Logger

	store Store
	busy  keyLock
}

// New returns a Controller on a catalogue.
func New(store Store) *Controller {
	return &Controller{
		Logger: slog.New(slog.DiscardHandler), store: store, busy: keyLock{held: map[string]struct{}{}},
	}
}

// Volume returns a volume as it is now; ErrNotFound.
func (c *Controller) Volume(ctx context.Context, id trivet.VolumeID) (meta.Volume, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return meta.Volume{}, err
	}
	return lookUp(s, id)
}

// VolumeByName returns the volume that holds a name; ErrNotFound.
func (c *Controller) VolumeByName(ctx context.Context, name string) (meta.Volume, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return meta.Volume{}, err
	}
	v, ok := s.VolumeByName(name)
	if !ok {
		return meta.Volume{}, fmt.Errorf("volume %q: %w", name, trivet.ErrNotFound)
	}
	return v, nil
}

// Volumes returns every volume as it is now, sorted by ID, those being deleted included.
func (c *Controller) Volumes(ctx context.Context) ([]meta.Volume, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return nil, err
	}
	return s.Volumes(), nil
}

// Nodes returns every node as it is now, sorted by ID.
func (c *Controller) Nodes(ctx context.Context) ([]meta.Node, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return nil, err
	}
	return s.Nodes(), nil
}

// Status is a summary of the cluster.
type Status struct {
	Cluster  trivet.ClusterID
	Created  time.Time // UTC
	Revision meta.Revision
	Leader   trivet.NodeID // of the meta group; "" unknown
	Nodes    []meta.Node
	Down     []trivet.NodeID // nodes whose lease has run out
	Volumes  map[meta.Phase]int
	Degraded int // volumes with a faulted replica, one on a node that is down, or fewer than are wanted
}

// Status returns a summary of the cluster as it is now.
func (c *Controller) Status(ctx context.Context) (Status, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return Status{}, err
	}
	st := Status{
		Cluster: s.Cluster(), Created: s.Created(), Revision: s.Revision(), Leader: c.store.Leader(),
		Nodes: s.Nodes(), Volumes: map[meta.Phase]int{},
	}
	now, down := time.Now(), map[trivet.NodeID]bool{}
	for _, n := range st.Nodes {
		if !n.Alive(now) {
			st.Down, down[n.ID] = append(st.Down, n.ID), true
		}
	}
	for _, v := range s.Volumes() {
		st.Volumes[v.Phase]++
		short := v.Phase != meta.PhaseDeleting && len(v.Replicas) < v.Want()
		if short || slices.ContainsFunc(v.Replicas, func(r meta.Replica) bool {
			return r.State == meta.ReplicaFaulted || down[r.Node]
		}) {
			st.Degraded++
		}
	}
	return st, nil
}

func lookUp(s *meta.State, id trivet.VolumeID) (meta.Volume, error) {
	v, ok := s.Volume(id)
	if !ok {
		return meta.Volume{}, fmt.Errorf("volume %s: %w", id, trivet.ErrNotFound)
	}
	return v, nil
}

// await waits until done says so of the local copy, once that has reached revision since: a copy
// that lags must not be asked about what it has not heard of. ErrUnavailable, naming what was waited
// for, when ctx ends first.
func (c *Controller) await(ctx context.Context, what string, since meta.Revision,
	done func(*meta.State) (bool, error),
) error {
	tick := time.NewTicker(recheckEvery)
	defer tick.Stop()
	for {
		changed := c.store.Changed()
		if s := c.store.Local(); s.Revision() >= since {
			if ok, err := done(s); ok || err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			// Not the context's own error: "deadline exceeded" must not be taken for "not done".
			return fmt.Errorf("%s: still waiting (%v): %w", what, context.Cause(ctx), trivet.ErrUnavailable)
		}
	}
}

// keyLock lets one verb at a time work on a thing.
type keyLock struct {
	mu   sync.Mutex
	held map[string]struct{}
}

// lock takes key and returns what gives it back, or ErrPending.
func (k *keyLock) lock(key string) (unlock func(), err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, taken := k.held[key]; taken {
		return nil, fmt.Errorf("%s: another operation is under way: %w", key, trivet.ErrPending)
	}
	k.held[key] = struct{}{}
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.held, key)
	}, nil
}
