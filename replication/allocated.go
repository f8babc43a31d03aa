package replication

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication/transport"
)

// Which blocks hold data is asked of the leader, whoever may answer reads: a block that is called free is skipped, and
// nobody would notice that the answer was old. KindVolumeAllocated, big endian:
//
//	0         1      8       16    24       32
//	+---------+------+-------+-----+--------+
//	| version | zero | epoch | lba | blockN |
//	+---------+------+-------+-----+--------+
//
// The reply is that of wire.go, with the extents of snapread.go as data.
const allocatedBytes = 32

var _ trivet.Allocator = (*Volume)(nil)

type allocatedRequest struct {
	epoch  trivet.Epoch
	lba    trivet.LBA
	blockN int64
}

func (r *allocatedRequest) append(dst []byte) []byte {
	dst = append(dst, wireVersion, 0, 0, 0, 0, 0, 0, 0)
	dst = binary.BigEndian.AppendUint64(dst, uint64(r.epoch))
	dst = binary.BigEndian.AppendUint64(dst, uint64(r.lba))
	return binary.BigEndian.AppendUint64(dst, uint64(r.blockN))
}

func decodeAllocated(b []byte) (allocatedRequest, error) {
	if len(b) != allocatedBytes || !versionAndZeroes(b[:8]) {
		return allocatedRequest{}, fmt.Errorf("allocated message of %d bytes: want version %d, %d bytes: %w", len(b),
			wireVersion, allocatedBytes, trivet.ErrInvalid)
	}
	r := allocatedRequest{
		epoch: trivet.Epoch(binary.BigEndian.Uint64(b[8:])), lba: trivet.LBA(binary.BigEndian.Uint64(b[16:])),
		blockN: int64(binary.BigEndian.Uint64(b[24:])),
	}
	if r.lba >= lbaMax || r.blockN <= 0 || r.blockN > lbaMax {
		return allocatedRequest{}, fmt.Errorf("extents of %d blocks from %d: %w", r.blockN, r.lba, trivet.ErrInvalid)
	}
	return r, nil
}

// Allocated implements trivet.Allocator. It costs the leader a look at the map, of some thousand blocks that are stored
// at most, and nobody any data.
func (v *Volume) Allocated(ctx context.Context, off, n int64, runs []trivet.Run) (int, error) {
	if err := trivet.CheckRange(off, n, v.Size()); err != nil {
		return 0, fmt.Errorf("block status of %s: %w", v.cfg.ID, err)
	}
	req := allocatedRequest{
		epoch: v.cfg.Epoch, lba: trivet.LBA(off / trivet.BlockSize), blockN: n / trivet.BlockSize,
	}
	used := 0
	err := v.call(ctx, func(ctx context.Context) error {
		if err := v.takeSlot(ctx); err != nil {
			return err
		}
		defer func() { <-v.slots }()
		return v.callLeader(ctx, true, func(ctx context.Context, node trivet.NodeID) (reply, error) {
			out, err := v.allocatedAt(ctx, node, &req)
			if err != nil || out.code != codeDone {
				return out, err
			}
			extents, next, err := decodeExtents(out.data, req.lba, req.lba+trivet.LBA(req.blockN))
			used = runsOf(req.lba, next, extents, runs)
			return out, err
		})
	})
	switch {
	case errors.Is(err, trivet.ErrCorrupt), errors.Is(err, trivet.ErrInvalid):
		// Its map is damaged, where reads may still be answered elsewhere, or its program does not know the question.
		v.log.Warn("all is taken for data, for the leader cannot tell", "off", off, "bytes", n, "err", err)
		runs[0] = trivet.Run{LenBytes: n, Allocated: true}
		return 1, nil
	case err != nil:
		return 0, fmt.Errorf("block status of %s from %d: %w", v.cfg.ID, off, err)
	}
	return used, nil
}

func (v *Volume) allocatedAt(ctx context.Context, node trivet.NodeID, req *allocatedRequest) (reply, error) {
	if v.cfg.Host != nil && node == v.cfg.Network.Local() {
		return v.cfg.Host.allocated(node, v.cfg.ID, req)
	}
	m, err := v.cfg.Network.Call(ctx, node, transport.Message{
		Kind: transport.KindVolumeAllocated, Group: v.cfg.ID, Body: req.append(nil),
	})
	if err != nil {
		return reply{}, err
	}
	out, err := decodeReply(m.Body, max(len(m.Body)-replyHeaderBytes, 0))
	if err == nil && out.code == codeDone && out.crc != readSum(v.cfg.ID, req.lba, out.data) {
		return reply{}, fmt.Errorf("reply of %s has crc32c %08x: %w", node, out.crc, trivet.ErrCorrupt)
	}
	return out, err
}

// runsOf writes to runs what the blocks from lba to next are, of which extents hold data, and returns how many it used:
// fewer blocks if runs has no room. It is pure.
func runsOf(lba, next trivet.LBA, extents []engine.Extent, runs []trivet.Run) (used int) {
	add := func(n int64, allocated bool) bool {
		switch {
		case n == 0:
		case used > 0 && runs[used-1].Allocated == allocated:
			runs[used-1].LenBytes += n * trivet.BlockSize
		case used == len(runs):
			return false
		default:
			runs[used] = trivet.Run{LenBytes: n * trivet.BlockSize, Allocated: allocated}
			used++
		}
		return true
	}
	for _, x := range extents {
		if !add(int64(x.LBA-lba), false) || !add(x.BlockN, true) {
			return used
		}
		lba = x.LBA + trivet.LBA(x.BlockN)
	}
	add(int64(next-lba), false)
	return used
}

// handleAllocated answers KindVolumeAllocated.
func (h *Host) handleAllocated(_ context.Context, from trivet.NodeID, m transport.Message) (
	transport.Message, error,
) {
	req, err := decodeAllocated(m.Body)
	if err != nil {
		return transport.Message{}, err
	}
	out, err := h.allocated(from, m.Group, &req)
	if err != nil {
		return transport.Message{}, err
	}
	if out.code == codeDone {
		out.crc = readSum(m.Group, req.lba, out.data)
	}
	return transport.Message{Body: out.append(nil)}, nil
}

func (h *Host) allocated(from trivet.NodeID, id trivet.VolumeID, req *allocatedRequest) (reply, error) {
	r, err := h.admit(from, id, req.epoch)
	if err != nil {
		return reply{}, err
	}
	if r == nil {
		return reply{code: codeNotLeader}, nil
	}
	term, data, err := r.allocated(req)
	out, err := r.reply(term, err)
	out.data = data
	return out, err
}

// allocated lists extents as the leader, while it holds its lease.
func (r *Replica) allocated(req *allocatedRequest) (term uint64, data []byte, err error) {
	if err := r.checkReadEpoch(req.epoch, false); err != nil {
		return 0, nil, err
	}
	term, err = r.group.ReadGate() // before the look: the answer is as new as the gate (I15)
	if err != nil {
		return 0, nil, err
	}
	if err := r.checkReadEpoch(req.epoch, true); err != nil {
		return 0, nil, err
	}
	extents, next, err := r.machine.vol.Allocated(engine.Live, req.lba, req.blockN)
	if err != nil {
		return 0, nil, err
	}
	return term, appendExtents(nil, extents, next), nil
}
