package controller

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// The directory of the catalogue:
//
//	member      who this member of the meta group is (identity)
//	catalogue   the state at some applied index (snapshot); the log above it is applied again
//	raft/       the group's own: who it is, and its snapshot record
//	log/        its entries, term and vote (log.go)
const (
	identityFile = "member"
	snapshotFile = "catalogue"
	raftDir      = "raft"
	tmpSuffix    = ".tmp"

	fileBytesMax = 1 << 30 // a catalogue of some million volumes
)

// Both files have the same frame:
//
//	offset  size  field
//	0       4     magic: "TMID" or "TMSN"
//	4       1     version
//	5       3     zero
//	8       8     n, length of the body, little endian
//	16      n     body
//	16+n    4     CRC32C of everything before, little endian
const (
	identityMagic = "TMID"
	snapshotMagic = "TMSN"
	fileVersion   = 1
	frameHeader   = 16
	frameTrailer  = 4
)

func seal(magic string, body []byte) []byte {
	b := make([]byte, frameHeader, frameHeader+len(body)+frameTrailer)
	copy(b, magic)
	b[4] = fileVersion
	binary.LittleEndian.PutUint64(b[8:], uint64(len(body)))
	b = append(b, body...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// unseal returns the body of a frame. ErrCorrupt when it is damaged, ErrInvalid for a version that
// this program does not know.
func unseal(magic string, b []byte) ([]byte, error) {
	if len(b) < frameHeader+frameTrailer || string(b[:4]) != magic {
		return nil, fmt.Errorf("%d bytes without the header %s: %w", len(b), magic, trivet.ErrCorrupt)
	}
	if b[4] != fileVersion {
		return nil, fmt.Errorf("version %d, this program knows %d: %w", b[4], fileVersion, trivet.ErrInvalid)
	}
	end := len(b) - frameTrailer
	if n := binary.LittleEndian.Uint64(b[8:]); n != uint64(end-frameHeader) {
		return nil, fmt.Errorf("%d bytes, header says %d: %w", end-frameHeader, n, trivet.ErrCorrupt)
	}
	got, want := crc32.Checksum(b[:end], crc32.MakeTable(crc32.Castagnoli)), binary.LittleEndian.Uint32(b[end:])
	if got != want {
		return nil, fmt.Errorf("checksum %08x, want %08x: %w", got, want, trivet.ErrCorrupt)
	}
	return b[frameHeader:end], nil
}

// The states of an identity. A joiner is a member at once; a bootstrapper only when the cluster is
// initialised, so that a bootstrap which a crash cut short is neither taken for done nor refused.
const (
	stateBootstrapping = "bootstrapping"
	stateMember        = "member"
)

// identity says which replica of the meta group this directory is (H10, H11). It is drawn once; a
// directory that was wiped gets another.
type identity struct {
	Cluster trivet.ClusterID `json:"cluster"`
	Node    trivet.NodeID    `json:"node"`
	Replica trivet.ReplicaID `json:"replica"`
	State   string           `json:"state"`
}

func (i identity) encode() ([]byte, error) {
	body, err := json.Marshal(i)
	if err != nil {
		return nil, err
	}
	return seal(identityMagic, body), nil
}

func decodeIdentity(b []byte) (identity, error) {
	body, err := unseal(identityMagic, b)
	if err != nil {
		return identity{}, err
	}
	var i identity
	if err := json.Unmarshal(body, &i); err != nil {
		return identity{}, fmt.Errorf("%w: %w", err, trivet.ErrCorrupt)
	}
	if trivet.ValidateUUID(string(i.Replica)) != nil || i.State != stateBootstrapping && i.State != stateMember {
		return identity{}, fmt.Errorf("replica %q in state %q: %w", i.Replica, i.State, trivet.ErrCorrupt)
	}
	return i, nil
}

// snapshot is the state together with the log entry that made it.
type snapshot struct {
	index, term uint64
	state       *meta.State
}

// encode returns index, term (8 bytes each, little endian) and the image of the state, in a frame.
func (s snapshot) encode() ([]byte, error) {
	image, err := s.state.EncodeImage()
	if err != nil {
		return nil, err
	}
	body := binary.LittleEndian.AppendUint64(make([]byte, 0, 16+len(image)), s.index)
	body = binary.LittleEndian.AppendUint64(body, s.term)
	return seal(snapshotMagic, append(body, image...)), nil
}

func decodeSnapshot(b []byte) (snapshot, error) {
	body, err := unseal(snapshotMagic, b)
	if err != nil {
		return snapshot{}, err
	}
	if len(body) < 16 {
		return snapshot{}, fmt.Errorf("body of %d bytes: %w", len(body), trivet.ErrCorrupt)
	}
	state, err := meta.DecodeImage(body[16:])
	if err != nil {
		return snapshot{}, err
	}
	return snapshot{
		index: binary.LittleEndian.Uint64(body), term: binary.LittleEndian.Uint64(body[8:]), state: state,
	}, nil
}

// writeFile replaces a file so that a crash leaves the old content or the new, and the new one is
// durable on return.
func writeFile(fs vfs.FS, dir, name string, content []byte) (err error) {
	path := fs.PathJoin(dir, name)
	tmp := path + tmpSuffix
	f, err := fs.Create(tmp, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	if _, err = f.Write(content); err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = fs.Rename(tmp, path)
	}
	if err != nil {
		return err
	}
	return syncDir(fs, dir)
}

// makeDir makes a directory, with those above it, durable.
func makeDir(fs vfs.FS, dir string) error {
	var parents []string // of the directories that are missing
	for at := dir; ; at = fs.PathDir(at) {
		_, err := fs.Stat(at)
		if err == nil || at == fs.PathDir(at) {
			break
		}
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		parents = append(parents, fs.PathDir(at))
	}
	if err := fs.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, p := range parents {
		if err := syncDir(fs, p); err != nil {
			return err
		}
	}
	return nil
}

func syncDir(fs vfs.FS, dir string) error {
	d, err := fs.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// readFile returns the content of a file. ErrNotFound when it is not there.
func readFile(fs vfs.FS, dir, name string) ([]byte, error) {
	f, err := fs.Open(fs.PathJoin(dir, name))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("file %s: %w", name, trivet.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	return readAll(f)
}

func readAll(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, fileBytesMax+1))
	if err != nil {
		return nil, err
	}
	if len(b) > fileBytesMax {
		return nil, fmt.Errorf("more than %d bytes: %w", fileBytesMax, trivet.ErrCorrupt)
	}
	return b, nil
}
