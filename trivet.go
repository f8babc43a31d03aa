// Package trivet is the vocabulary of the project: the identifiers, units, limits and sentinel
// errors that every other package shares, and Device, the one interface of the data path.
//
// It does no I/O and imports the standard library only, so anything may import it. The words
// are explained in docs/glossary.md.
package trivet

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

const (
	// BlockSize is the unit of storage in bytes. Every offset and length on the data path is a
	// multiple of it.
	BlockSize = 4096

	// AtomicWriteBytes is the largest write, in bytes, that is applied whole or not at all. A
	// larger write is atomic per block only.
	AtomicWriteBytes = 64 << 10

	// VolumeSizeMax is the largest volume in bytes (64 TiB).
	VolumeSizeMax = 64 << 40

	// NameBytesMax is the longest name of a volume in bytes (CSI limits strings to 128 bytes).
	NameBytesMax = 128

	// DriverName is the name by which Kubernetes knows the driver. PersistentVolumes embed it,
	// so it never changes.
	DriverName = "csi.trivet.dev"
)

// LBA is the number of a block within a volume: byte offset / BlockSize.
type LBA uint64

// Epoch is the fencing counter of a volume's attachments. It only rises: every attach, detach
// and take-over by a new process raises it, and requests of a lower epoch are refused. Zero
// means never attached.
type Epoch uint64

// Generation is the snapshot version of a block. A snapshot freezes the current generation and
// starts the next.
type Generation uint32

// VolumeID identifies a volume, and the Raft group of its replicas, for ever: it is drawn at
// random and never used again. Zero is the group of the catalogue (MetaGroup).
type VolumeID uint64

// MetaGroup is the group that keeps the catalogue. No volume has this ID.
const MetaGroup VolumeID = 0

// SnapshotID identifies a snapshot for ever, as VolumeID does a volume: in the catalogue, and in the replicated
// state of its volume. Zero is none.
type SnapshotID uint64

// SnapshotGroupID identifies a group of snapshots that were made at one point, for ever. Zero is none.
type SnapshotGroupID uint64

// NodeID is the name of a machine that runs `trivet server`: its Kubernetes node name.
type NodeID string

// DiskID is the UUID in the superblock of a disk. A wiped disk gets a new one.
type DiskID string

// ReplicaID is the UUID of one disk's copy of a volume, and its Raft ServerID. It is never
// reused: a replica that lost its data comes back under a new one.
type ReplicaID string

// ClusterID is the UUID of a cluster; it is part of every certificate and superblock.
type ClusterID string

// ReadConsistency says which replica of a volume may answer a read, and so how old the answer may be. What
// is read was committed in each case.
type ReadConsistency string

// The consistencies.
const (
	// ReadStrong: the leader answers, while it holds its lease. A read returns what the last write that was
	// acknowledged before it left, whoever made it, or a later one (linearizable). The default.
	ReadStrong ReadConsistency = "strong"
	// ReadSession: any replica answers that has applied all that this attachment has written and read. The
	// holder of an attachment sees no difference; a node that has lost it, without having noticed, may read
	// what was so before.
	ReadSession ReadConsistency = "session"
	// ReadEventual: the replica beside the reader answers with whatever it has applied. Two reads may go back in
	// time. It is for attachments that only read; on others it means ReadSession.
	ReadEventual ReadConsistency = "eventual"
)

const (
	volumeIDPrefix   = "vol-"
	snapshotIDPrefix = "snap-"

	snapshotGroupIDPrefix = "snapgroup-"
)

// NewVolumeID draws a volume ID at random. The catalogue refuses one that was ever used.
func NewVolumeID() VolumeID {
	for {
		var b [8]byte
		rand.Read(b[:]) //nolint:errcheck // crypto/rand.Read never fails since Go 1.24
		if id := VolumeID(binary.BigEndian.Uint64(b[:])); id != MetaGroup {
			return id
		}
	}
}

// String returns the form used in volume handles, paths and logs: vol- and 16 hex digits.
func (v VolumeID) String() string {
	if v == MetaGroup {
		return "meta"
	}
	return fmt.Sprintf("%s%016x", volumeIDPrefix, uint64(v))
}

// ParseVolumeID is the inverse of String. It returns ErrInvalid for anything else, the name of
// the meta group included.
func ParseVolumeID(s string) (VolumeID, error) {
	n, err := parseID("volume", volumeIDPrefix, s)
	return VolumeID(n), err
}

func parseID(what, prefix, s string) (uint64, error) {
	hexPart, ok := strings.CutPrefix(s, prefix)
	if !ok || len(hexPart) != 16 || strings.ToLower(hexPart) != hexPart {
		return 0, fmt.Errorf("%s id %q: want %s and 16 hex digits: %w", what, s, prefix, ErrInvalid)
	}
	b, err := hex.DecodeString(hexPart)
	if err != nil || binary.BigEndian.Uint64(b) == 0 {
		return 0, fmt.Errorf("%s id %q: want %s and 16 hex digits: %w", what, s, prefix, ErrInvalid)
	}
	return binary.BigEndian.Uint64(b), nil
}

// NewSnapshotID draws a snapshot ID at random.
func NewSnapshotID() SnapshotID { return SnapshotID(NewVolumeID()) }

// String returns the form used in snapshot handles and logs: snap- and 16 hex digits.
func (s SnapshotID) String() string { return fmt.Sprintf("%s%016x", snapshotIDPrefix, uint64(s)) }

// ParseSnapshotID is the inverse of String. It returns ErrInvalid for anything else.
func ParseSnapshotID(s string) (SnapshotID, error) {
	n, err := parseID("snapshot", snapshotIDPrefix, s)
	return SnapshotID(n), err
}

// NewSnapshotGroupID draws the ID of a group of snapshots at random.
func NewSnapshotGroupID() SnapshotGroupID { return SnapshotGroupID(NewVolumeID()) }

// String returns the form used in handles and logs: snapgroup- and 16 hex digits.
func (g SnapshotGroupID) String() string {
	return fmt.Sprintf("%s%016x", snapshotGroupIDPrefix, uint64(g))
}

// ParseSnapshotGroupID is the inverse of String. It returns ErrInvalid for anything else.
func ParseSnapshotGroupID(s string) (SnapshotGroupID, error) {
	n, err := parseID("snapshot group", snapshotGroupIDPrefix, s)
	return SnapshotGroupID(n), err
}

// NewUUID returns a random (version 4) UUID in its canonical form.
func NewUUID() string {
	var b [16]byte
	rand.Read(b[:]) //nolint:errcheck // crypto/rand.Read never fails since Go 1.24
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// ValidateUUID returns ErrInvalid unless s is a UUID in canonical lower-case form.
func ValidateUUID(s string) error {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return fmt.Errorf("uuid %q: want the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx: %w", s, ErrInvalid)
	}
	for _, part := range strings.Split(s, "-") {
		if strings.Trim(part, "0123456789abcdef") != "" {
			return fmt.Errorf("uuid %q: has a character that is not a lower-case hex digit: %w", s, ErrInvalid)
		}
	}
	return nil
}

// ValidateName returns ErrInvalid unless s may name a volume: 1 to NameBytesMax bytes of valid
// UTF-8 without control characters, '/' or the names "." and "..", as CSI and safe logs demand.
func ValidateName(s string) error {
	switch {
	case s == "":
		return fmt.Errorf("name is empty: %w", ErrInvalid)
	case len(s) > NameBytesMax:
		return fmt.Errorf("name has %d bytes, at most %d are allowed: %w", len(s), NameBytesMax, ErrInvalid)
	case s == "." || s == "..":
		return fmt.Errorf("name %q is reserved: %w", s, ErrInvalid)
	case strings.HasPrefix(s, "-"):
		return fmt.Errorf("name %q begins with '-': %w", s, ErrInvalid)
	}
	for _, r := range s {
		if r < 0x20 || (r >= 0x7f && r < 0xa0) || r == '/' || r == '\\' || r == '\uFFFD' {
			return fmt.Errorf("name %q has the forbidden character %U: %w", s, r, ErrInvalid)
		}
	}
	return nil
}

// ValidateNodeID returns ErrInvalid unless s is a DNS subdomain of at most 128 bytes (RFC 1123),
// as Kubernetes demands of node names and CSI of node IDs.
func ValidateNodeID(s string) error {
	if s == "" || len(s) > NameBytesMax {
		return fmt.Errorf("node name %q: want 1 to %d bytes: %w", s, NameBytesMax, ErrInvalid)
	}
	for _, label := range strings.Split(s, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" ||
			label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("node name %q: want lower-case letters, digits, '-' and '.': %w", s, ErrInvalid)
		}
	}
	return nil
}
