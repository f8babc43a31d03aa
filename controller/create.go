package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

const (
	// DefaultVolumeBytes is the size of a volume for which none is asked.
	DefaultVolumeBytes = 1 << 30

	// sizeUnit is what sizes are rounded up to, where the limit allows it.
	sizeUnit = 1 << 20
)

// CreateRequest asks for a volume.
type CreateRequest struct {
	Name string // trivet.ValidateName

	// RequiredBytes and LimitBytes bound the size. Zero means unbounded; if both are, the size is
	// DefaultVolumeBytes.
	RequiredBytes, LimitBytes int64

	Params map[string]string // ParseParams

	Labels map[string]string // CheckLabels; of a new volume: one that is there already keeps its own

	// Mutable goes before the parameters that a copy has of its source (WithMutable). Without Source it is not looked at.
	Mutable map[string]string

	// Requisite and Preferred are segments of TopologyNode, TopologyRack and TopologyZone; see PlaceRequest.
	Requisite, Preferred []map[string]string

	// Source is what the volume begins as a copy of; zero = nothing. Without Params it has the source's, without a size
	// the source's, and a smaller one is ErrOutOfRange.
	Source CopyOf

	// Unclaimed makes the volume Available, for somebody to claim later (static provisioning). By
	// default it is made for a claim and Bound.
	Unclaimed bool
}

// size returns the size of a new volume in bytes. ErrInvalid when negative, ErrOutOfRange when no
// size fits.
func (r *CreateRequest) size() (int64, error) {
	required, limit := r.RequiredBytes, r.LimitBytes
	switch {
	case required < 0 || limit < 0:
		return 0, fmt.Errorf("size of %d to %d bytes: negative: %w", required, limit, trivet.ErrInvalid)
	case limit > 0 && required > limit:
		return 0, fmt.Errorf("size of %d bytes: exceeds the limit of %d: %w", required, limit, trivet.ErrOutOfRange)
	case required > trivet.VolumeSizeMax:
		return 0, fmt.Errorf("size of %d bytes: a volume has at most %d: %w",
			required, int64(trivet.VolumeSizeMax), trivet.ErrOutOfRange)
	case required == 0 && limit == 0:
		return DefaultVolumeBytes, nil
	case required == 0:
		required = min(DefaultVolumeBytes, limit/trivet.BlockSize*trivet.BlockSize)
	}
	for _, unit := range []int64{sizeUnit, trivet.BlockSize} {
		if size := (required + unit - 1) / unit * unit; size > 0 && (limit == 0 || size <= limit) {
			return size, nil
		}
	}
	return 0, fmt.Errorf("size of %d to %d bytes: no multiple of %d lies in between: %w",
		r.RequiredBytes, limit, trivet.BlockSize, trivet.ErrOutOfRange)
}

// fits reports whether a volume of that size answers the request.
func (r *CreateRequest) fits(size int64) bool {
	return size >= r.RequiredBytes && (r.LimitBytes == 0 || size <= r.LimitBytes)
}

// creation is a validated CreateRequest on its way.
type creation struct {
	CreateRequest
	params Params
	bytes  int64
	// request replaces that of the parameters: it is that of the copy of that name which exists, when none are given.
	request string
	from    *meta.Snapshot         // what it is made of; nil = nothing
	there   bool                   // a copy of that name existed already, so its source was not looked for
	avoid   map[trivet.NodeID]bool // where it did not work out
}

// CreateVolume makes a volume and returns it once every replica is ready. The same request again
// returns the same volume, whatever became of the first call.
//
// ErrInvalid names what is wrong with the request; ErrExists means that the name belongs to a volume
// with other parameters, another size or another owner; ErrOutOfRange that no disk is that large;
// ErrNoSpace that too few nodes have room: then nothing was made.
func (c *Controller) CreateVolume(ctx context.Context, r CreateRequest) (meta.Volume, error) {
	v, err := c.createVolume(ctx, r)
	if err != nil {
		return meta.Volume{}, fmt.Errorf("create volume %q: %w", r.Name, err)
	}
	return v, nil
}

func (c *Controller) createVolume(ctx context.Context, r CreateRequest) (meta.Volume, error) {
	if err := trivet.ValidateName(r.Name); err != nil {
		return meta.Volume{}, err
	}
	if err := CheckLabels(r.Labels); err != nil {
		return meta.Volume{}, err
	}
	unlock, err := c.busy.lock("volume name " + r.Name)
	if err != nil {
		return meta.Volume{}, err
	}
	defer unlock()
	w := &creation{CreateRequest: r, avoid: map[trivet.NodeID]bool{}}
	if _, err := ParseParams(w.Params); err != nil { // before a snapshot is made for it
		return meta.Volume{}, err
	}
	if err := c.takeSource(ctx, w); err != nil {
		return meta.Volume{}, err
	}
	if w.params, err = ParseParams(w.Params); err != nil {
		return meta.Volume{}, err
	}
	if w.bytes, err = w.size(); err != nil {
		return meta.Volume{}, err
	}
	for {
		v, err := c.reserve(ctx, w)
		if err != nil {
			return meta.Volume{}, err
		}
		v, bad, err := c.awaitReady(ctx, v)
		if err != nil || len(bad) == 0 {
			return v, err
		}
		// It holds no data yet, so it is dropped rather than repaired, and made elsewhere.
		c.Logger.Warn("replicas of a new volume did not come up; placing it anew", "volume", v.ID, "nodes", bad)
		for _, node := range bad {
			w.avoid[node] = true
		}
		drop := meta.Command{Release: &meta.Release{Volume: v.ID, Discard: true, IfRevision: v.Revision}}
		if _, err := c.store.Propose(ctx, drop); err != nil && !errors.Is(err, trivet.ErrPending) {
			return meta.Volume{}, err // ErrPending: it has moved on, so look again
		}
	}
}

// reserve finds the volume of that name or places a new one, and returns its record.
func (c *Controller) reserve(ctx context.Context, w *creation) (meta.Volume, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return meta.Volume{}, err
	}
	want := meta.Volume{
		ID: trivet.NewVolumeID(), Name: w.Name, SizeBytes: w.bytes, Reclaim: w.params.Reclaim,
		Params: w.params.Map(), Request: cmp.Or(w.request, w.params.Fingerprint()+w.Source.String()), Created: time.Now(),
		Labels: w.Labels,
	}
	if w.from != nil {
		want.Source, want.WantReplicas = &meta.Source{Snapshot: w.from.ID}, w.params.Replicas
	}
	if v, ok := s.VolumeByName(w.Name); ok {
		if v.Request != want.Request {
			return meta.Volume{}, fmt.Errorf("%s has that name and other parameters %v: %w", v.ID, v.Params, trivet.ErrExists)
		}
		// Proposed all the same, without replicas of its own: it may have to be claimed, and the catalogue
		// has the last word.
	} else if w.there {
		return meta.Volume{}, fmt.Errorf("it was deleted meanwhile: %w", trivet.ErrUnavailable)
	} else if w.Source != (CopyOf{}) && w.from == nil {
		return meta.Volume{}, fmt.Errorf("its source %s: %w", w.Source, trivet.ErrNotFound)
	} else if want.Replicas, err = w.place(s); err != nil {
		return meta.Volume{}, err
	}
	res, err := c.store.Propose(ctx, meta.Command{CreateVolume: &meta.CreateVolume{Volume: want, Claim: !w.Unclaimed}})
	switch {
	case errors.Is(err, trivet.ErrPending) && want.Source != nil: // the source's replicas have moved since the read
		return meta.Volume{}, fmt.Errorf("%v: %w", err, trivet.ErrUnavailable)
	case errors.Is(err, trivet.ErrNotFound): // a disk, or the volume of that name, went away since the read
		return meta.Volume{}, fmt.Errorf("%v: %w", err, trivet.ErrUnavailable)
	case err != nil:
		return meta.Volume{}, err
	case res.Volume == nil:
		return meta.Volume{}, fmt.Errorf("catalogue returned no volume: %w", trivet.ErrUnavailable)
	case !w.fits(res.Volume.SizeBytes):
		return meta.Volume{}, fmt.Errorf("%s has that name and %d bytes, want %d to %d: %w",
			res.Volume.ID, res.Volume.SizeBytes, w.RequiredBytes, w.LimitBytes, trivet.ErrExists)
	}
	return *res.Volume, nil
}

// place chooses disks for a new volume and names its replicas.
func (w *creation) place(s *meta.State) ([]meta.Replica, error) {
	if w.from != nil {
		return w.placeBeside(s, time.Now())
	}
	nodes := s.Nodes()
	var largest int64
	for _, n := range nodes {
		for _, d := range n.Disks {
			largest = max(largest, d.SizeBytes)
		}
	}
	if largest > 0 && w.bytes > largest {
		return nil, fmt.Errorf("size of %d bytes: the largest disk has %d: %w", w.bytes, largest, trivet.ErrOutOfRange)
	}
	nodes = slices.DeleteFunc(nodes, func(n meta.Node) bool { return w.avoid[n.ID] })
	replicas, err := Place(nodes, PlaceRequest{
		SizeBytes: w.bytes, Replicas: w.params.Replicas, Spread: w.params.Spread,
		Requisite: w.Requisite, Preferred: w.Preferred, Load: LoadOf(s.Volumes()),
	}, time.Now())
	if err != nil && len(w.avoid) > 0 {
		// The nodes that failed may only have been slow: not the caller's fault, nor for ever.
		return nil, fmt.Errorf("nodes %v did not bring up their replicas, and without them: %v: %w",
			slices.Sorted(maps.Keys(w.avoid)), err, trivet.ErrUnavailable)
	}
	if err != nil {
		return nil, err
	}
	for i := range replicas {
		replicas[i].ID = trivet.ReplicaID(trivet.NewUUID())
	}
	return replicas, nil
}

// awaitReady waits until v can be used. It returns the nodes whose replicas will not come up: they
// reported a fault, or are down.
func (c *Controller) awaitReady(ctx context.Context, v meta.Volume) (_ meta.Volume, bad []trivet.NodeID, err error) {
	id := v.ID
	what := fmt.Sprintf("replicas of %s", id)
	err = c.await(ctx, what, v.Revision, func(s *meta.State) (bool, error) {
		var ok bool
		if v, ok = s.Volume(id); !ok {
			return false, fmt.Errorf("%s was deleted meanwhile: %w", id, trivet.ErrUnavailable)
		}
		switch v.Phase {
		case meta.PhaseAvailable, meta.PhaseBound:
			return true, nil
		case meta.PhaseCreating:
			bad = lost(s, &v, time.Now())
			return len(bad) > 0, nil
		case meta.PhaseReleased, meta.PhaseRecycling, meta.PhaseDeleting, meta.PhaseFailed, meta.PhaseKept,
			meta.PhaseRestoring:
		}
		return false, fmt.Errorf("%s is %s %s: %w", id, v.Phase, v.Reason, trivet.ErrUnavailable)
	})
	return v, bad, err
}

// lost returns the nodes on which a replica of v is faulted, or not made and the node down.
func lost(s *meta.State, v *meta.Volume, now time.Time) []trivet.NodeID {
	var out []trivet.NodeID
	for _, r := range v.Replicas {
		n, ok := s.Node(r.Node)
		waiting := r.State == meta.ReplicaCreating
		if r.State == meta.ReplicaFaulted || waiting && (!ok || !n.Alive(now)) {
			out = append(out, r.Node)
		}
	}
	return out
}

// Capacity returns the bytes available for new volumes with these parameters, and the size in bytes
// of the largest one. A segment limits both to volumes with a replica there; an empty one means the
// whole cluster. ErrInvalid for bad parameters.
func (c *Controller) Capacity(ctx context.Context, params, segment map[string]string,
) (available, largest int64, err error) {
	p, err := ParseParams(params)
	if err != nil {
		return 0, 0, fmt.Errorf("capacity: %w", err)
	}
	s, err := c.store.Read(ctx)
	if err != nil {
		return 0, 0, err
	}
	available, largest = capacity(s.Nodes(), p, segment, time.Now())
	return available, largest, nil
}

func capacity(nodes []meta.Node, p Params, segment map[string]string, now time.Time) (available, largest int64) {
	req := PlaceRequest{Replicas: p.Replicas, Spread: p.Spread}
	if len(segment) > 0 {
		req.Requisite = []map[string]string{segment}
	}
	able := slices.DeleteFunc(slices.Clone(nodes), func(n meta.Node) bool { return !n.Alive(now) || n.Cordoned })
	var sizes []int64
	for _, n := range able {
		sizes = append(sizes, freeBytes(&n))
	}
	// The largest size that can be placed is what some node has free.
	slices.Sort(sizes)
	for _, size := range slices.Backward(sizes) {
		req.SizeBytes = min(size, trivet.VolumeSizeMax) / sizeUnit * sizeUnit
		if req.SizeBytes == 0 {
			break
		}
		if _, err := Place(nodes, req, now); err == nil {
			largest = req.SizeBytes
			break
		}
	}
	if largest == 0 {
		return 0, 0
	}
	available = fitting(able, req, now)
	return max(available, largest), largest
}
