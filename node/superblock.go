package node

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
)

// superblockVersion is the format that this version writes and the only one that it reads (H36). It tells how
// the disk is laid out: since 2 the Raft logs of its groups are one shared log; on a disk of version 1 each
// group had files of its own, which nothing reads any more. Since 3 the blocks of volumes stand in that log, which
// has a
// lane for them, and the engine refers to them.
const superblockVersion = 3

const (
	superblockMagic    = "trivet superblock"
	superblockBytesMax = 4096
)

// superblock says whose a disk is. On disk it is three lines of text, so that an operator can read
// it with cat:
//
//	trivet superblock 3                       magic and version
//	{"cluster":"…","node":"…","disk":"…",…}   one line of JSON, fields in this order
//	crc32c 0123abcd                           of the two lines above, line ends included
//
// A superblock never changes: it is written once, when the disk is formatted.
type superblock struct {
	Cluster   trivet.ClusterID `json:"cluster"`
	Node      trivet.NodeID    `json:"node"`
	Disk      trivet.DiskID    `json:"disk"`
	Formatted time.Time        `json:"formatted"`
	Place     place            `json:"place"`
}

// place is where a superblock was written: the inodes of the disk's directory and of the superblock
// file, with their times of birth. It tells the disk from a copy of it (cp -a, rsync, a restored
// backup; H4, H11): a rename within the filesystem keeps all four, a copy cannot keep the birth
// times, which no system call sets. Inode numbers alone would not do, since the first files of
// two fresh filesystems have the same ones; device numbers and filesystem IDs would not do either,
// since they change with the order in which disks are found at boot.
//
// A block-level image of the whole filesystem does keep them. The catalogue catches that one: it
// refuses a disk ID that is registered by another node.
type place struct {
	Dir  inode `json:"dir"`
	File inode `json:"file"`
}

// inode identifies a file for as long as it exists. Born is zero where the filesystem keeps no time
// of birth; the number alone must then do.
type inode struct {
	Number uint64 `json:"inode"`
	Born   int64  `json:"born"` // nanoseconds since 1970
}

func (s *superblock) validate() error {
	if err := trivet.ValidateUUID(string(s.Cluster)); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	if err := trivet.ValidateNodeID(string(s.Node)); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	if err := trivet.ValidateUUID(string(s.Disk)); err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	return nil
}

// encode returns the bytes on disk. REQUIRES: s is valid.
func (s *superblock) encode() ([]byte, error) {
	body, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode superblock: %w", err)
	}
	return appendChecksum(fmt.Appendf(nil, "%s %d\n%s\n", superblockMagic, superblockVersion, body)), nil
}

func appendChecksum(b []byte) []byte {
	return fmt.Appendf(b, "crc32c %08x\n", crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// decodeSuperblock is the inverse of encode. It returns ErrCorrupt for damaged bytes and ErrInvalid
// for a version that this program does not know.
func decodeSuperblock(b []byte) (*superblock, error) {
	if len(b) > superblockBytesMax {
		return nil, fmt.Errorf("superblock has more than %d bytes: %w", superblockBytesMax, trivet.ErrCorrupt)
	}
	head, rest, ok1 := bytes.Cut(b, []byte("\n"))
	body, tail, ok2 := bytes.Cut(rest, []byte("\n"))
	if !ok1 || !ok2 || !strings.HasPrefix(string(head), superblockMagic+" ") {
		return nil, fmt.Errorf("superblock is cut short or is none: %w", trivet.ErrCorrupt)
	}
	signed := b[:len(head)+len(body)+2]
	if want := appendChecksum(bytes.Clone(signed))[len(signed):]; !bytes.Equal(tail, want) {
		return nil, fmt.Errorf("superblock ends with %q, want %q: %w", tail, want, trivet.ErrCorrupt)
	}
	// The checksum is the same in every version, so an unknown version is known to be intact.
	if want := fmt.Sprintf("%s %d", superblockMagic, superblockVersion); string(head) != want {
		return nil, fmt.Errorf("superblock says %q, this version reads %q; a disk of another version is not taken over, "+
			"empty it and format it anew, and its replicas will be replaced: %w", head, want, trivet.ErrInvalid)
	}
	var s superblock
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return nil, fmt.Errorf("superblock: %w: %w", err, trivet.ErrCorrupt)
	}
	if dec.More() {
		return nil, fmt.Errorf("superblock has bytes after its fields: %w", trivet.ErrCorrupt)
	}
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("superblock: %w: %w", err, trivet.ErrCorrupt)
	}
	return &s, nil
}
