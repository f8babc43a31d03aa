package replication

import "github.com/trivet-csi/trivet"

// EncodeReadAt is the body of a KindVolumeScrub that asks for blocks as of an index.
func EncodeReadAt(index uint64, lba trivet.LBA, blockN int64) []byte {
	return (&scrubRequest{op: scrubReadAt, index: index, lba: lba, blockN: blockN}).append(nil)
}

// ScrubRequestBytes is the length of a KindVolumeScrub without items.
const ScrubRequestBytes = scrubRequestBytes

// The second byte of a KindVolumeScrub that has a view checked, makes blocks what others have, or asks for them.
const (
	ScrubCheck = byte(scrubCheck)
	ScrubFix   = byte(scrubFix)
	ScrubFetch = byte(scrubFetch)
)
