package driver_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// metadata is what a stream told.
type metadata struct {
	tuples   []*csi.BlockMetadata
	messages []int // number of tuples of each
	capacity int64
}

// page is what the messages of both calls have.
type page interface {
	GetBlockMetadataType() csi.BlockMetadataType
	GetVolumeCapacityBytes() int64
	GetBlockMetadata() []*csi.BlockMetadata
}

// collect reads a stream to its end and checks what must hold of every message.
func collect(t *testing.T, recv func() (page, error)) (metadata, error) {
	t.Helper()
	var out metadata
	end := int64(0)
	for {
		p, err := recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		require.Equal(t, csi.BlockMetadataType_VARIABLE_LENGTH, p.GetBlockMetadataType())
		if len(out.messages) > 0 {
			require.Equal(t, out.capacity, p.GetVolumeCapacityBytes())
		}
		out.capacity = p.GetVolumeCapacityBytes()
		out.messages = append(out.messages, len(p.GetBlockMetadata()))
		for _, x := range p.GetBlockMetadata() {
			require.Positive(t, x.GetSizeBytes())
			require.GreaterOrEqual(t, x.GetByteOffset(), end)
			end = x.GetByteOffset() + x.GetSizeBytes()
			require.LessOrEqual(t, end, out.capacity)
			out.tuples = append(out.tuples, x)
		}
	}
}

func allocated(t *testing.T, c csi.SnapshotMetadataClient, req *csi.GetMetadataAllocatedRequest) (metadata, error) {
	t.Helper()
	s, err := c.GetMetadataAllocated(t.Context(), req)
	if err != nil {
		return metadata{}, err
	}
	return collect(t, func() (page, error) { return s.Recv() })
}

func delta(t *testing.T, c csi.SnapshotMetadataClient, req *csi.GetMetadataDeltaRequest) (metadata, error) {
	t.Helper()
	s, err := c.GetMetadataDelta(t.Context(), req)
	if err != nil {
		return metadata{}, err
	}
	return collect(t, func() (page, error) { return s.Recv() })
}

// blocksOf returns which blocks of n the tuples cover.
func blocksOf(n int, tuples []*csi.BlockMetadata) []bool {
	out := make([]bool, n)
	for _, x := range tuples {
		for at := x.GetByteOffset(); at < x.GetByteOffset()+x.GetSizeBytes(); at += trivet.BlockSize {
			out[at/trivet.BlockSize] = true
		}
	}
	return out
}

func TestMetadataCodes(t *testing.T) {
	t.Parallel()
	const blocks = 8
	put := func(h *harness, s meta.Snapshot) string {
		return h.changes.put(s, make([]byte, blocks)).ID.String()
	}
	type body = func(context.Context, *testing.T, *harness) error
	of := func(change func(h *harness, r *csi.GetMetadataAllocatedRequest)) body {
		return func(_ context.Context, t *testing.T, h *harness) error {
			t.Helper()
			req := &csi.GetMetadataAllocatedRequest{SnapshotId: put(h, meta.Snapshot{Volume: 1, Name: "s"})}
			change(h, req)
			_, err := allocated(t, h, req)
			return err
		}
	}
	between := func(change func(h *harness, r *csi.GetMetadataDeltaRequest)) body {
		return func(_ context.Context, t *testing.T, h *harness) error {
			t.Helper()
			req := &csi.GetMetadataDeltaRequest{
				BaseSnapshotId:   put(h, meta.Snapshot{Volume: 1, Generation: 1}),
				TargetSnapshotId: put(h, meta.Snapshot{Volume: 1, Generation: 2}),
			}
			change(h, req)
			_, err := delta(t, h, req)
			return err
		}
	}
	type alloc = csi.GetMetadataAllocatedRequest
	type diff = csi.GetMetadataDeltaRequest
	in := func(s meta.Snapshot) func(*harness, *alloc) {
		return func(h *harness, r *alloc) { r.SnapshotId = put(h, s) }
	}
	const strange = "snap-0123456789abcdef"
	rows := []row{
		{"plain", of(func(*harness, *alloc) {}), codes.OK, ""},
		{"no id", of(func(_ *harness, r *alloc) { r.SnapshotId = "" }), codes.InvalidArgument, "snapshot_id"},
		{"unknown", of(func(_ *harness, r *alloc) { r.SnapshotId = strange }), codes.NotFound, strange},
		{"foreign", of(func(_ *harness, r *alloc) { r.SnapshotId = foreign }), codes.NotFound, foreign},
		{"negative offset", of(func(_ *harness, r *alloc) { r.StartingOffset = -1 }), codes.OutOfRange, "starting_offset"},
		{"offset at the end", of(func(_ *harness, r *alloc) {
			r.StartingOffset = blocks * trivet.BlockSize
		}), codes.OK, ""},
		{"offset beyond the end", of(func(_ *harness, r *alloc) {
			r.StartingOffset = blocks*trivet.BlockSize + 1
		}), codes.OutOfRange, "starting_offset"},
		{"negative maximum", of(func(_ *harness, r *alloc) { r.MaxResults = -1 }), codes.InvalidArgument, "max_results"},
		{"not made yet", of(in(meta.Snapshot{State: meta.SnapshotCreating})), codes.Unavailable, "Creating"},
		{"failed", of(in(meta.Snapshot{State: meta.SnapshotFailed})), codes.FailedPrecondition, "Failed"},
		{"deleted", of(in(meta.Snapshot{State: meta.SnapshotDeleting})), codes.NotFound, "Deleting"},
		{"of a clone", of(in(meta.Snapshot{Name: meta.HiddenPrefix + "x"})), codes.NotFound, ""},
		{"no quorum", of(func(h *harness, _ *alloc) {
			h.changes.fail("Snapshot", trivet.ErrUnavailable)
		}), codes.Unavailable, ""},
		{"no leader", of(func(h *harness, _ *alloc) {
			h.changes.fail("Snapshot", trivet.ErrNotLeader)
		}), codes.Unavailable, ""},
		{"no replica that has it", of(func(h *harness, _ *alloc) {
			h.changes.fail("Changes", trivet.ErrNotFound)
		}), codes.Unavailable, ""},
		{"deleted meanwhile", of(func(h *harness, r *alloc) {
			h.changes.on("Changes", func(context.Context, any) error {
				id, err := trivet.ParseSnapshotID(r.GetSnapshotId())
				if err != nil {
					return err
				}
				h.changes.put(meta.Snapshot{ID: id, State: meta.SnapshotDeleting}, nil)
				return trivet.ErrNotFound
			})
		}), codes.NotFound, ""},

		{"delta", between(func(*harness, *diff) {}), codes.OK, ""},
		{"delta to itself", between(func(_ *harness, r *diff) { r.BaseSnapshotId = r.TargetSnapshotId }), codes.OK, ""},
		{"no base", between(func(_ *harness, r *diff) { r.BaseSnapshotId = "" }), codes.InvalidArgument, "base_snapshot_id"},
		{"no target, unknown base", between(func(_ *harness, r *diff) {
			r.TargetSnapshotId, r.BaseSnapshotId = "", strange
		}), codes.InvalidArgument, "target_snapshot_id"},
		{"unknown base", between(func(_ *harness, r *diff) { r.BaseSnapshotId = strange }), codes.NotFound, strange},
		{"unknown target", between(func(_ *harness, r *diff) { r.TargetSnapshotId = strange }), codes.NotFound, strange},
		{"the wrong way round", between(func(_ *harness, r *diff) {
			r.BaseSnapshotId, r.TargetSnapshotId = r.TargetSnapshotId, r.BaseSnapshotId
		}), codes.InvalidArgument, "newer"},
		{"of two volumes", between(func(h *harness, r *diff) {
			r.BaseSnapshotId = put(h, meta.Snapshot{Volume: 2, Generation: 1})
		}), codes.InvalidArgument, "one volume"},
		{"delta beyond the end", between(func(_ *harness, r *diff) {
			r.StartingOffset = blocks*trivet.BlockSize + 1
		}), codes.OutOfRange, "starting_offset"},
		{"delta from before the beginning", between(func(_ *harness, r *diff) {
			r.StartingOffset = -4096
		}), codes.OutOfRange, "starting_offset"},
	}
	for _, handle := range hostile {
		rows = append(rows, row{
			fmt.Sprintf("hostile handle %.20q", handle),
			of(func(_ *harness, r *alloc) { r.SnapshotId = handle }), codes.InvalidArgument, "snapshot_id",
		})
	}
	runRows(t, rows)
}

// TestMetadataAgainstBytes compares both calls with what the blocks say, resumed at every offset and cut into messages
// of every size.
func TestMetadataAgainstBytes(t *testing.T) {
	t.Parallel()
	const blocks = 64
	r := rand.New(rand.NewSource(7))
	base, target := make([]byte, blocks), make([]byte, blocks)
	for i := range base {
		base[i] = byte(r.Intn(2))
		target[i] = base[i]
		if r.Intn(3) == 0 {
			target[i] = 2
		}
	}
	h := open(t, nil)
	from := h.changes.put(meta.Snapshot{Volume: 1, Generation: 1}, base[:blocks/2]) // it has grown since
	to := h.changes.put(meta.Snapshot{Volume: 1, Generation: 2}, target)
	changed := func(i int) bool { return i >= blocks/2 && target[i] != 0 || i < blocks/2 && base[i] != target[i] }
	check := func(got metadata, err error, offset, most int, want func(int) bool) {
		t.Helper()
		require.NoError(t, err)
		covered := blocksOf(blocks, got.tuples)
		for i := range blocks {
			require.Equal(t, i >= offset/trivet.BlockSize && want(i), covered[i], "block %d from offset %d", i, offset)
		}
		if len(got.tuples) > 0 {
			first := got.tuples[0]
			require.Less(t, int64(offset), first.GetByteOffset()+first.GetSizeBytes())
			require.Equal(t, int64(blocks*trivet.BlockSize), got.capacity)
		}
		for _, n := range got.messages {
			require.LessOrEqual(t, n, most)
			require.Positive(t, n)
		}
	}
	for i := range blocks {
		for _, within := range []int{0, 1, trivet.BlockSize - 1} {
			offset := i*trivet.BlockSize + within
			got, err := delta(t, h, &csi.GetMetadataDeltaRequest{
				BaseSnapshotId: from.ID.String(), TargetSnapshotId: to.ID.String(), StartingOffset: int64(offset),
			})
			check(got, err, offset, blocks, changed)
		}
	}
	for most := 1; most <= blocks; most++ {
		got, err := allocated(t, h, &csi.GetMetadataAllocatedRequest{
			SnapshotId: to.ID.String(), MaxResults: int32(most),
		})
		check(got, err, 0, most, func(i int) bool { return target[i] != 0 })
	}
}

// TestMetadataBreaksOff: what breaks off ends with an error, never as if all had been told, and goes on from where it
// broke off.
func TestMetadataBreaksOff(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	blocks := make([]byte, 32)
	for i := 0; i < len(blocks); i += 2 {
		blocks[i] = 1
	}
	snap := h.changes.put(meta.Snapshot{Volume: 1}, blocks)
	h.changes.breaks(20 * trivet.BlockSize)
	req := &csi.GetMetadataAllocatedRequest{SnapshotId: snap.ID.String(), MaxResults: 2}
	got, err := allocated(t, h, req)
	requireCode(t, codes.Unavailable, err)
	require.NotEmpty(t, got.tuples)
	last := got.tuples[len(got.tuples)-1]
	h.changes.breaks(0)
	req.StartingOffset = last.GetByteOffset() + last.GetSizeBytes()
	rest, err := allocated(t, h, req)
	require.NoError(t, err)
	covered := blocksOf(len(blocks), append(got.tuples, rest.tuples...))
	for i := range blocks {
		require.Equal(t, blocks[i] == 1, covered[i], "block %d", i)
	}
}

// TestProxyPassesStreamsOn: csi-controller tells what the server tells, its errors included.
func TestProxyPassesStreamsOn(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	c := csi.NewSnapshotMetadataClient(openProxy(t, u, nil))
	snap := u.changes.put(meta.Snapshot{Volume: 1, Generation: 1}, []byte{1, 0, 1, 1, 0, 0, 1})
	req := &csi.GetMetadataAllocatedRequest{SnapshotId: snap.ID.String(), MaxResults: 1}
	got, err := allocated(t, c, req)
	require.NoError(t, err)
	require.Equal(t, []int{1, 1, 1}, got.messages)
	require.Equal(t, []bool{true, false, true, true, false, false, true}, blocksOf(7, got.tuples))
	_, err = delta(t, c, &csi.GetMetadataDeltaRequest{
		BaseSnapshotId: snap.ID.String(), TargetSnapshotId: snap.ID.String(),
	})
	require.NoError(t, err)

	_, err = allocated(t, c, &csi.GetMetadataAllocatedRequest{SnapshotId: "snap-0123456789abcdef"})
	requireCode(t, codes.NotFound, err)
	u.changes.breaks(6 * trivet.BlockSize)
	got, err = allocated(t, c, req)
	requireCode(t, codes.Unavailable, err)
	require.NotEmpty(t, got.tuples)

	u.grpc.Stop()
	_, err = allocated(t, c, req)
	requireCode(t, codes.Unavailable, err)
}
