package replication

import (
	"encoding/binary"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// Bodies of KindVolumeScrub, by which the replicas of a volume compare and repair their blocks; the volume is the
// message's Group. Big endian. A request with a byte too many or too few is ErrInvalid, a reply ErrCorrupt.
//
//	request
//	0         1    2        4       8       16    24       32     40
//	+---------+----+--------+-------+-------+-----+--------+------+--------------+
//	| version | op | repair | itemN | index | lba | blockN | rate | items (20)   |
//	+---------+----+--------+-------+-------+-----+--------+------+--------------+
//
//	reply
//	0         1      2      4       8       16       24      32         40     48     56      88       120
//	+---------+------+------+-------+-------+--------+-------+----------+------+------+-------+--------+-------+------+
//	| version | more | zero | itemN | index | blockN | found | repaired | left | next | state | blocks | items | data |
//	+---------+------+------+-------+-------+--------+-------+----------+------+------+-------+--------+-------+------+
//
//	item: lba (8), generation (4), checksum (4), flag (4)
//
// repair and more are 0 or 1, state and blocks the digests of engine.Checked. Data are a block for each item of a fetch
// whose flag is itemHas, or the blocks of a readAt; they are verified by the checksums of the one who asked, or
// by that of the one item. Those of a check whose blockN is scrubWithOlder are engine.Checked.Older; a program that
// does not know that answers without.
const (
	scrubVersion      = 1
	scrubRequestBytes = 40
	scrubReplyBytes   = 120
	scrubItemBytes    = 20

	// scrubWithOlder is the blockN of a check, which needs none, that asks what the snapshots show as well.
	scrubWithOlder = 1

	// fetchBlocksMax is how many blocks are fetched in a message: 256 KiB.
	fetchBlocksMax = 64
	// scrubRangeN is how many versions of blocks a marker covers, 32 MiB: as much as a mismatch costs to compare, and as
	// is done again after an interruption.
	scrubRangeN = 8192
	// scrubItemsMax is the most items of a message.
	scrubItemsMax = scrubRangeN
)

// scrubOp says what a message asks for. Values are part of the format.
type scrubOp uint8

const (
	scrubProbe    scrubOp = 1 // whether this replica knows what a marker is
	scrubFetch    scrubOp = 2 // the data of versions of blocks
	scrubReadAt   scrubOp = 3 // blocks as of an applied index or later
	scrubCheck    scrubOp = 4 // read and digest the view of a marker; more: not done yet, ask again
	scrubVersions scrubOp = 5 // what that view has
	scrubFix      scrubOp = 6 // make blocks of that view what the others have
	scrubAccuse   scrubOp = 7 // the state of this replica is not what the others have
	scrubDone     scrubOp = 8 // let the view go
)

// The flags of items.
const (
	itemNone    = 0 // fetch: has no such version. fix: the block reads as zeroes
	itemHas     = 1 // fetch: its data follow. fix: the block has that version
	itemDamaged = 2 // fetch: has it, damaged
	itemFlagEnd = 3
)

// scrubItem is a version of a block, and what is said of it.
type scrubItem struct {
	engine.BlockVersion
	flag uint32
}

type scrubRequest struct {
	op     scrubOp
	repair bool
	index  uint64 // of the marker, or that must be applied
	lba    trivet.LBA
	blockN int64
	rate   int64 // bytes per second; 0 = no limit
	items  []scrubItem
}

type scrubReply struct {
	more          bool
	index         uint64 // of the newest entry that the data can show
	blockN        int64  // versions of blocks that were read
	found         int64  // of them, damaged ones, or such as differed
	repaired      int64
	left          int64 // that nobody could repair
	next          trivet.LBA
	state, blocks [32]byte
	items         []scrubItem
	data          []byte
}

func appendItems(dst []byte, items []scrubItem) []byte {
	be := binary.BigEndian
	for _, i := range items {
		dst = be.AppendUint64(dst, uint64(i.LBA))
		dst = be.AppendUint32(dst, uint32(i.Generation))
		dst = be.AppendUint32(dst, i.Sum)
		dst = be.AppendUint32(dst, i.flag)
	}
	return dst
}

func decodeItems(b []byte, n int) ([]scrubItem, error) {
	if n == 0 {
		return nil, nil
	}
	be, items := binary.BigEndian, make([]scrubItem, n)
	for i := range items {
		x := b[i*scrubItemBytes:]
		items[i] = scrubItem{engine.BlockVersion{
			LBA: trivet.LBA(be.Uint64(x)), Generation: trivet.Generation(be.Uint32(x[8:])), Sum: be.Uint32(x[12:]),
		}, be.Uint32(x[16:])}
		if items[i].LBA >= lbaMax || items[i].flag >= itemFlagEnd {
			return nil, fmt.Errorf("item of block %d with flag %d", items[i].LBA, items[i].flag)
		}
	}
	return items, nil
}

func (r *scrubRequest) append(dst []byte) []byte {
	be, repair := binary.BigEndian, byte(0)
	if r.repair {
		repair = 1
	}
	dst = append(dst, scrubVersion, byte(r.op), repair, 0)
	dst = be.AppendUint32(dst, uint32(len(r.items)))
	for _, x := range []uint64{r.index, uint64(r.lba), uint64(r.blockN), uint64(r.rate)} {
		dst = be.AppendUint64(dst, x)
	}
	return appendItems(dst, r.items)
}

func decodeScrubRequest(b []byte) (scrubRequest, error) {
	be := binary.BigEndian
	if len(b) < scrubRequestBytes || b[0] != scrubVersion || b[2] > 1 || b[3] != 0 {
		return scrubRequest{}, fmt.Errorf("scrub message of %d bytes: want version %d: %w", len(b), scrubVersion,
			trivet.ErrInvalid)
	}
	n := be.Uint32(b[4:])
	r := scrubRequest{
		op: scrubOp(b[1]), repair: b[2] == 1, index: be.Uint64(b[8:]), lba: trivet.LBA(be.Uint64(b[16:])),
		blockN: int64(be.Uint64(b[24:])), rate: int64(be.Uint64(b[32:])),
	}
	if n > scrubItemsMax || len(b) != scrubRequestBytes+int(n)*scrubItemBytes || r.op < scrubProbe || r.op > scrubDone ||
		r.lba > lbaMax || r.blockN < 0 || r.blockN > lbaMax || r.rate < 0 {
		return scrubRequest{}, fmt.Errorf("scrub message %d of %d bytes with %d items: %w", b[1], len(b), n,
			trivet.ErrInvalid)
	}
	var err error
	if r.items, err = decodeItems(b[scrubRequestBytes:], int(n)); err != nil {
		return scrubRequest{}, fmt.Errorf("scrub message: %v: %w", err, trivet.ErrInvalid)
	}
	return r, nil
}

func (r *scrubReply) append(dst []byte) []byte {
	be, more := binary.BigEndian, byte(0)
	if r.more {
		more = 1
	}
	dst = append(dst, scrubVersion, more, 0, 0)
	dst = be.AppendUint32(dst, uint32(len(r.items)))
	for _, x := range []uint64{
		r.index, uint64(r.blockN), uint64(r.found), uint64(r.repaired), uint64(r.left), uint64(r.next),
	} {
		dst = be.AppendUint64(dst, x)
	}
	dst = append(append(dst, r.state[:]...), r.blocks[:]...)
	return append(appendItems(dst, r.items), r.data...)
}

// decodeScrubReply is the inverse of append; data is a slice of b.
func decodeScrubReply(b []byte) (scrubReply, error) {
	be := binary.BigEndian
	if len(b) < scrubReplyBytes || b[0] != scrubVersion || b[1] > 1 || b[2] != 0 || b[3] != 0 {
		return scrubReply{}, fmt.Errorf("scrub reply of %d bytes: want version %d: %w", len(b), scrubVersion,
			trivet.ErrCorrupt)
	}
	n := be.Uint32(b[4:])
	if n > scrubItemsMax || len(b) < scrubReplyBytes+int(n)*scrubItemBytes {
		return scrubReply{}, fmt.Errorf("scrub reply of %d bytes with %d items: %w", len(b), n, trivet.ErrCorrupt)
	}
	num := func(i int) int64 { return int64(be.Uint64(b[8+8*i:])) }
	r := scrubReply{
		more: b[1] == 1, index: uint64(num(0)), blockN: num(1), found: num(2), repaired: num(3), left: num(4),
		next: trivet.LBA(num(5)), state: [32]byte(b[56:]), blocks: [32]byte(b[88:]),
	}
	if r.blockN < 0 || r.found < 0 || r.repaired < 0 || r.left < 0 || r.next > lbaMax {
		return scrubReply{}, fmt.Errorf("scrub reply counts %d, %d, %d, %d, goes on at %d: %w", r.blockN, r.found, r.repaired,
			r.left, r.next, trivet.ErrCorrupt)
	}
	var err error
	if r.items, err = decodeItems(b[scrubReplyBytes:], int(n)); err != nil {
		return scrubReply{}, fmt.Errorf("scrub reply: %v: %w", err, trivet.ErrCorrupt)
	}
	if rest := b[scrubReplyBytes+int(n)*scrubItemBytes:]; len(rest) > 0 {
		r.data = rest
	}
	return r, nil
}
