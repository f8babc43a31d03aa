package replication

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication/transport"
)

// What a snapshot shows never changes, so any replica that has applied its freeze may answer, whether its group runs
// or sleeps: the requests go to the engine of the disk. Big endian.
//
//	read a snapshot                                  list extents
//	0         1      4        8          16    24    0         1      8      16   24    32       40
//	+---------+------+--------+----------+-----+     +---------+------+------+----+-----+--------+
//	| version | zero | blockN | snapshot | lba |     | version | zero | from | to | lba | blockN |
//	+---------+------+--------+----------+-----+     +---------+------+------+----+-----+--------+
//
// The reply to a read is that of wire.go. That to a list is the version, three zeroes, the number of extents (4),
// where to ask again (8), and each extent as first block and number of blocks (8 each). from is zero for what to holds.
const (
	snapReadBytes   = 24
	snapDeltaBytes  = 40
	extentsHead     = 16
	extentBytes     = 16
	extentsInAReply = 1024 // more than the engine lists at a time
)

// SnapshotReader reads snapshots of one volume from whichever node has them. It is safe for concurrent use.
type SnapshotReader struct {
	Volume  trivet.VolumeID
	Network transport.Network
	Host    *Host           // of this node, asked first; may be nil
	Nodes   []trivet.NodeID // with a replica of the volume
}

// ReadAt fills p, whole blocks and at most 1 MiB, from what the snapshot shows from block lba on; beyond the size that
// the volume had there are zeroes. ErrNotFound: no node has the snapshot; ErrOutOfRange: beyond the volume's size;
// ErrUnavailable: none that may have it answers.
func (s *SnapshotReader) ReadAt(ctx context.Context, snap trivet.SnapshotID, p []byte, lba trivet.LBA) error {
	n := len(p) / trivet.BlockSize
	if n == 0 || len(p)%trivet.BlockSize != 0 || len(p) > readBytesMax || lba >= lbaMax {
		return fmt.Errorf("read %d bytes from block %d of %s: %w", len(p), lba, snap, trivet.ErrInvalid)
	}
	body := make([]byte, snapReadBytes)
	body[0] = wireVersion
	binary.BigEndian.PutUint32(body[4:], uint32(n))
	binary.BigEndian.PutUint64(body[8:], uint64(snap))
	binary.BigEndian.PutUint64(body[16:], uint64(lba))
	err := s.ask(ctx, transport.KindVolumeSnapRead, body, func(b []byte) error {
		r, err := decodeReply(b, len(p))
		if err != nil {
			return err
		}
		if got := readSum(s.Volume, lba, r.data); r.code != codeDone || got != r.crc {
			return fmt.Errorf("reply has code %d, crc32c %08x, want %08x: %w", r.code, got, r.crc, trivet.ErrCorrupt)
		}
		copy(p, r.data)
		return nil
	})
	if err != nil {
		return fmt.Errorf("read %d blocks from %d of %s: %w", n, lba, snap, err)
	}
	return nil
}

// Delta lists, in order, the runs of blocks among blockN from lba on in which snapshot to may show something else than
// snapshot from, or, with from zero, something at all. next is where to ask again; at lba+blockN all is listed. Errors
// as of ReadAt.
func (s *SnapshotReader) Delta(ctx context.Context, from, to trivet.SnapshotID, lba trivet.LBA, blockN int64) (
	out []engine.Extent, next trivet.LBA, err error,
) {
	body := make([]byte, snapDeltaBytes)
	body[0] = wireVersion
	binary.BigEndian.PutUint64(body[8:], uint64(from))
	binary.BigEndian.PutUint64(body[16:], uint64(to))
	binary.BigEndian.PutUint64(body[24:], uint64(lba))
	binary.BigEndian.PutUint64(body[32:], uint64(blockN))
	err = s.ask(ctx, transport.KindVolumeDelta, body, func(b []byte) (err error) {
		out, next, err = decodeExtents(b, lba, lba+trivet.LBA(blockN))
		return err
	})
	if err != nil {
		return nil, lba, fmt.Errorf("changes of %s from %s to %s, from block %d: %w", s.Volume, from, to, lba, err)
	}
	return out, next, nil
}

// ask asks one node after the other until one answers; the error says what the last one that knew something said.
func (s *SnapshotReader) ask(ctx context.Context, kind transport.Kind, body []byte, use func([]byte) error) error {
	local := s.Network.Local()
	nodes := slices.Clone(s.Nodes)
	slices.SortStableFunc(nodes, func(a, b trivet.NodeID) int {
		return order(b == local) - order(a == local)
	})
	last := fmt.Errorf("no node has a replica: %w", trivet.ErrNotFound)
	for _, node := range nodes {
		m := transport.Message{Kind: kind, Group: s.Volume, Body: body}
		var err error
		if node == local && s.Host != nil {
			m, err = s.Host.handleSnapshot(ctx, node, m)
		} else {
			m, err = s.Network.Call(ctx, node, m)
		}
		if err == nil {
			err = use(m.Body)
		}
		if err == nil || errors.Is(err, trivet.ErrOutOfRange) || ctx.Err() != nil {
			return err
		}
		if !errors.Is(err, trivet.ErrNotFound) || errors.Is(last, trivet.ErrNotFound) {
			last = fmt.Errorf("node %s: %w", node, err)
		}
	}
	return last
}

func order(first bool) int {
	if first {
		return 1
	}
	return 0
}

// handleSnapshot answers KindVolumeSnapRead and KindVolumeDelta.
func (h *Host) handleSnapshot(_ context.Context, _ trivet.NodeID, m transport.Message) (transport.Message, error) {
	want := snapReadBytes
	if m.Kind == transport.KindVolumeDelta {
		want = snapDeltaBytes
	}
	if len(m.Body) != want || !versionAndZeroes(m.Body[:4]) {
		return transport.Message{}, fmt.Errorf("snapshot message of %d bytes: want version %d, %d bytes: %w", len(m.Body),
			wireVersion, want, trivet.ErrInvalid)
	}
	var body []byte
	var err error
	if m.Kind == transport.KindVolumeDelta {
		body, err = h.listExtents(m.Group, m.Body)
	} else {
		body, err = h.readSnapshot(m.Group, m.Body)
	}
	return transport.Message{Body: body}, err
}

func (h *Host) readSnapshot(id trivet.VolumeID, b []byte) ([]byte, error) {
	n, lba := binary.BigEndian.Uint32(b[4:]), trivet.LBA(binary.BigEndian.Uint64(b[16:]))
	if n == 0 || n > readBytesMax/trivet.BlockSize || lba >= lbaMax {
		return nil, fmt.Errorf("read of %d blocks from %d: %w", n, lba, trivet.ErrInvalid)
	}
	vol, gens, err := h.keeping(id, trivet.SnapshotID(binary.BigEndian.Uint64(b[8:])))
	if err != nil {
		return nil, err
	}
	body, data := newReadReply(int(n) * trivet.BlockSize)
	if err := vol.ReadAtGeneration(data, lba, gens[0]); err != nil {
		return nil, err
	}
	r := reply{code: codeDone, crc: readSum(id, lba, data)}
	r.putHeader(body)
	return body, nil
}

func (h *Host) listExtents(id trivet.VolumeID, b []byte) ([]byte, error) {
	be := binary.BigEndian
	from, to := trivet.SnapshotID(be.Uint64(b[8:])), trivet.SnapshotID(be.Uint64(b[16:]))
	lba, blockN := trivet.LBA(be.Uint64(b[24:])), int64(be.Uint64(b[32:]))
	if blockN <= 0 || blockN > lbaMax || lba >= lbaMax {
		return nil, fmt.Errorf("extents of %d blocks from %d: %w", blockN, lba, trivet.ErrInvalid)
	}
	snaps := []trivet.SnapshotID{to}
	if from != 0 {
		snaps = append(snaps, from)
	}
	vol, gens, err := h.keeping(id, snaps...)
	if err != nil {
		return nil, err
	}
	var out []engine.Extent
	var next trivet.LBA
	if from == 0 {
		out, next, err = vol.Allocated(gens[0], lba, blockN)
	} else {
		out, next, err = vol.Delta(gens[1], gens[0], lba, blockN)
	}
	if err != nil {
		return nil, err
	}
	return appendExtents(nil, out, next), nil
}

// keeping finds the replica on a disk of this node that has snapshots of a volume, and which generations they keep.
func (h *Host) keeping(id trivet.VolumeID, snaps ...trivet.SnapshotID) (*engine.Volume, []trivet.Generation, error) {
	for i := range h.cfg.Disks {
		vol, err := h.cfg.Disks[i].Engine.OpenVolume(id)
		if notFound(err) {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		var gens []trivet.Generation
		st := vol.State()
		for _, snap := range snaps {
			for _, s := range st.Snapshots {
				if s.ID == uint64(snap) {
					gens = append(gens, s.Generation)
				}
			}
		}
		if len(gens) == len(snaps) && !vol.Restoring() {
			return vol, gens, nil
		}
	}
	return nil, nil, fmt.Errorf("no disk of %s has %v of %s: %w", h.cfg.Network.Local(), snaps, id, trivet.ErrNotFound)
}

func appendExtents(dst []byte, xs []engine.Extent, next trivet.LBA) []byte {
	dst = append(dst, wireVersion, 0, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(xs)))
	dst = binary.BigEndian.AppendUint64(dst, uint64(next))
	for _, x := range xs {
		dst = binary.BigEndian.AppendUint64(dst, uint64(x.LBA))
		dst = binary.BigEndian.AppendUint64(dst, uint64(x.BlockN))
	}
	return dst
}

// decodeExtents is the inverse of appendExtents. It returns ErrCorrupt for what is no list of blocks from at up to end,
// in order, with next behind them and beyond at.
func decodeExtents(b []byte, at, end trivet.LBA) ([]engine.Extent, trivet.LBA, error) {
	if len(b) < extentsHead || !versionAndZeroes(b[:4]) {
		return nil, 0, fmt.Errorf("extents of %d bytes: want version %d: %w", len(b), wireVersion, trivet.ErrCorrupt)
	}
	n, next := int(binary.BigEndian.Uint32(b[4:])), trivet.LBA(binary.BigEndian.Uint64(b[8:]))
	if n > extentsInAReply || len(b) != extentsHead+n*extentBytes || next <= at || next > end {
		return nil, 0, fmt.Errorf("%d extents in %d bytes, next %d of %d to %d: %w", n, len(b), next, at, end,
			trivet.ErrCorrupt)
	}
	out := make([]engine.Extent, 0, n)
	for b = b[extentsHead:]; len(b) > 0; b = b[extentBytes:] {
		x := engine.Extent{LBA: trivet.LBA(binary.BigEndian.Uint64(b)), BlockN: int64(binary.BigEndian.Uint64(b[8:]))}
		if x.LBA < at || x.BlockN <= 0 || x.BlockN > int64(next) || x.LBA > next-trivet.LBA(x.BlockN) {
			return nil, 0, fmt.Errorf("extent of %d blocks from %d between %d and %d: %w", x.BlockN, x.LBA, at, next,
				trivet.ErrCorrupt)
		}
		at = x.LBA + trivet.LBA(x.BlockN)
		out = append(out, x)
	}
	return out, next, nil
}
