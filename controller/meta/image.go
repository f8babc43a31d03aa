package meta

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
)

// A full image of the catalogue. Equal states give equal bytes.
//
//	offset  size  field
//	0       4     magic "TMIM"
//	4       1     version
//	5       3     zero
//	8       8     n, length of the JSON, little endian
//	16      n     JSON of struct image: nodes and volumes sorted by ID
//	16+n    4     CRC32C of everything before, little endian
const (
	imageMagic = "TMIM"
	// 3 had no snapshots, no Scrub, one size a volume and no audit, 2 one attachment a volume, 1 no WantReplicas, Retired,
	// Cordoned and Draining; they are read still.
	imageVersion = 4
	imageOldest  = 1
	imageHeader  = 16
	imageTrailer = 4
)

type image struct {
	Revision Revision          `json:"revision"`
	Cluster  trivet.ClusterID  `json:"cluster"`
	Created  time.Time         `json:"created"`
	Nodes    []Node            `json:"nodes"`
	Volumes  []Volume          `json:"volumes"`
	Used     []trivet.VolumeID `json:"used"`

	Snapshots []Snapshot      `json:"snapshots,omitempty"`
	Forgotten []trivet.NodeID `json:"forgotten,omitempty"`
	Audit     Audit           `json:"audit,omitzero"`

	SnapshotGroups []SnapshotGroup `json:"snapshotGroups,omitempty"`
}

// EncodeImage returns the state as bytes that DecodeImage reads.
func (s *State) EncodeImage() ([]byte, error) {
	im := image{
		Revision: s.revision,
		Cluster:  s.cluster,
		Created:  s.created,
		Nodes:    s.Nodes(),
		Volumes:  s.Volumes(),
		Used:     make([]trivet.VolumeID, 0, s.used.n),

		Snapshots: s.Snapshots(),
		Forgotten: s.forgotten,
		Audit:     s.Audit(),

		SnapshotGroups: s.SnapshotGroups(),
	}
	s.used.each(func(id trivet.VolumeID, _ struct{}) { im.Used = append(im.Used, id) })
	slices.Sort(im.Used)
	body, err := json.Marshal(im)
	if err != nil {
		return nil, fmt.Errorf("encode catalogue at revision %d: %w", s.revision, err)
	}
	b := make([]byte, imageHeader, imageHeader+len(body)+imageTrailer)
	copy(b, imageMagic)
	b[4] = imageVersion
	binary.LittleEndian.PutUint64(b[8:], uint64(len(body)))
	b = append(b, body...)
	return binary.LittleEndian.AppendUint32(b, checksum(b)), nil
}

// DecodeImage is the inverse of EncodeImage. It returns ErrCorrupt for bytes that are damaged,
// or that describe no possible catalogue, and ErrInvalid for a version it does not know.
func DecodeImage(b []byte) (*State, error) {
	if len(b) < imageHeader+imageTrailer || string(b[:4]) != imageMagic {
		return nil, fmt.Errorf("decode catalogue of %d bytes: no header: %w", len(b), trivet.ErrCorrupt)
	}
	if b[4] < imageOldest || b[4] > imageVersion {
		return nil, fmt.Errorf("decode catalogue: version %d, this program knows %d to %d: %w",
			b[4], imageOldest, imageVersion, trivet.ErrInvalid)
	}
	end := len(b) - imageTrailer
	if n := binary.LittleEndian.Uint64(b[8:]); n != uint64(end-imageHeader) {
		return nil, fmt.Errorf("decode catalogue: %d bytes of JSON, header says %d: %w",
			end-imageHeader, n, trivet.ErrCorrupt)
	}
	if got, want := checksum(b[:end]), binary.LittleEndian.Uint32(b[end:]); got != want {
		return nil, fmt.Errorf("decode catalogue: checksum %08x, want %08x: %w", got, want, trivet.ErrCorrupt)
	}
	var im image
	if err := decodeStrict(b[imageHeader:end], &im); err != nil {
		return nil, fmt.Errorf("decode catalogue: %w: %w", err, trivet.ErrCorrupt)
	}
	s, err := im.state()
	if err != nil {
		return nil, fmt.Errorf("decode catalogue at revision %d: %w", im.Revision, err)
	}
	return s, nil
}

func checksum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

// state builds and checks the catalogue that an image describes.
func (im *image) state() (*State, error) {
	s := &State{
		revision: im.Revision,
		cluster:  im.Cluster,
		created:  instant(im.Created),
		nodes:    make(map[trivet.NodeID]*Node, len(im.Nodes)),

		forgotten: im.Forgotten,
	}
	var err error
	if s.audit, err = auditLogOf(im.Audit); err != nil {
		return nil, err
	}
	for _, id := range im.Used {
		s.used.fill(id, struct{}{})
	}
	for i := range im.Nodes {
		n := im.Nodes[i].Clone()
		if _, ok := s.nodes[n.ID]; ok {
			return nil, fmt.Errorf("node %s is there twice: %w", n.ID, trivet.ErrCorrupt)
		}
		n.LeaseUntil = instant(n.LeaseUntil)
		s.nodes[n.ID] = &n
	}
	for i := range im.Volumes {
		v := im.Volumes[i].Clone()
		v.Created = instant(v.Created)
		if v.Scrub != nil {
			v.Scrub.instants()
		}
		if _, ok := s.volumes.get(v.ID); ok {
			return nil, fmt.Errorf("%s is there twice: %w", v.ID, trivet.ErrCorrupt)
		}
		s.volumes.fill(v.ID, &v)
		if v.Source != nil && !v.Source.Flattened {
			clones, _ := s.clonesOf.get(v.Source.Snapshot)
			s.clonesOf.fill(v.Source.Snapshot, insertID(clones, v.ID))
		}
		if v.Phase == PhaseDeleting || v.Phase == PhaseKept {
			continue
		}
		if other, ok := s.names.get(v.Name); ok {
			return nil, fmt.Errorf("%s and %s have the name %q: %w", other, v.ID, v.Name, trivet.ErrCorrupt)
		}
		s.names.fill(v.Name, v.ID)
	}
	if err := im.snapshots(s); err != nil {
		return nil, err
	}
	if err := im.snapshotGroups(s); err != nil {
		return nil, err
	}
	return s, s.check()
}

// check returns ErrCorrupt unless the state keeps the invariants of this package. No command breaks
// them; it guards against damage that kept its checksum and against our own mistakes.
func (s *State) check() error {
	var err error
	s.volumes.each(func(id trivet.VolumeID, v *Volume) {
		problem := s.problem(v)
		if problem == "" {
			problem = s.copyProblem(v)
		}
		if problem != "" && err == nil {
			err = fmt.Errorf("%s: %s: %w", id, problem, trivet.ErrCorrupt)
		}
	})
	for i, id := range s.forgotten {
		if s.nodes[id] != nil || i > 0 && s.forgotten[i-1] >= id {
			return fmt.Errorf("node %s is forgotten and registered, or twice: %w", id, trivet.ErrCorrupt)
		}
	}
	disks := map[trivet.DiskID]trivet.NodeID{}
	for _, n := range s.nodes {
		for _, d := range n.Disks {
			if other, ok := disks[d.ID]; ok {
				return fmt.Errorf("disk %s is on %s and %s: %w", d.ID, other, n.ID, trivet.ErrCorrupt)
			}
			disks[d.ID] = n.ID
		}
	}
	if err == nil {
		err = s.checkSnapshots()
	}
	if err == nil {
		err = s.checkGroups()
	}
	return err
}

// problem names the first invariant that v breaks.
func (s *State) problem(v *Volume) string {
	held := v.Attached
	switch {
	case v.ID == trivet.MetaGroup || !s.Used(v.ID):
		return "id is not among the used"
	case v.Revision > s.revision:
		return "revision lies in the future"
	case v.FencedEpoch > v.Epoch:
		return fmt.Sprintf("fenced at epoch %d above %d", v.FencedEpoch, v.Epoch)
	case held != nil && (held.Epoch != v.Epoch || v.Detaching != ""):
		return fmt.Sprintf("attached to %s at epoch %d of %d, detaching %q", held.Node, held.Epoch, v.Epoch, v.Detaching)
	case held != nil && s.nodes[held.Node] == nil:
		return fmt.Sprintf("attached to %s, which is unknown", held.Node)
	case held != nil && v.Phase != PhaseBound && v.Phase != PhaseFailed:
		return fmt.Sprintf("attached to %s while %s", held.Node, v.Phase)
	case v.Detaching != "" && v.FencedEpoch == v.Epoch:
		return fmt.Sprintf("detaching %s though fenced", v.Detaching)
	}
	if problem := s.readersProblem(v); problem != "" {
		return problem
	}
	if problem := v.replicaProblem(); problem != "" {
		return problem
	}
	if v.Recover != "" && v.Replica(v.Recover) == nil {
		return fmt.Sprintf("to be recovered from replica %s, which it has not", v.Recover)
	}
	if problem := v.sizeProblem(); problem != "" {
		return problem
	}
	if v.ThenDelete && v.Phase != PhaseRecycling {
		return fmt.Sprintf("to be deleted once it is wiped, while %s", v.Phase)
	}
	switch v.Phase {
	case PhaseReleased, PhaseRecycling, PhaseDeleting, PhaseKept, PhaseRestoring:
		if v.Detaching != "" {
			return fmt.Sprintf("detaching %s while %s", v.Detaching, v.Phase)
		}
	case PhaseCreating, PhaseAvailable, PhaseBound, PhaseFailed:
	default:
		return fmt.Sprintf("phase %q is unknown", v.Phase)
	}
	return ""
}

// readersProblem names the first invariant that several attachments of v break.
func (s *State) readersProblem(v *Volume) string {
	if len(v.Also) == 0 {
		return ""
	}
	if v.Attached == nil || v.Attached.Mode != MultiNodeReader || !v.Attached.ReadOnly {
		return fmt.Sprintf("%d readers beside none that reads", len(v.Also))
	}
	seen := map[trivet.NodeID]bool{v.Attached.Node: true}
	for _, a := range v.Also {
		switch {
		case seen[a.Node]:
			return fmt.Sprintf("attached to %s twice", a.Node)
		case s.nodes[a.Node] == nil:
			return fmt.Sprintf("attached to %s, which is unknown", a.Node)
		case a.Mode != MultiNodeReader || !a.ReadOnly || a.Epoch != v.Epoch:
			return fmt.Sprintf("attached to %s beside others as %s at epoch %d of %d", a.Node, a.Mode, a.Epoch, v.Epoch)
		}
		seen[a.Node] = true
	}
	return ""
}

// replicaProblem names the first invariant that the replicas of v break.
func (v *Volume) replicaProblem() string {
	ids, changing := map[trivet.ReplicaID]bool{}, 0
	for _, r := range append(slices.Clone(v.Replicas), v.Retired...) {
		if ids[r.ID] {
			return fmt.Sprintf("replica %s is there twice", r.ID)
		}
		ids[r.ID] = true
	}
	for _, r := range v.Replicas {
		if r.State.Changing() {
			changing++
		}
	}
	if changing > 1 {
		return fmt.Sprintf("%d replicas on their way in or out, at most one may be", changing)
	}
	for _, r := range v.Retired {
		if r.State != ReplicaLeft {
			return fmt.Sprintf("replica %s is retired as %s", r.ID, r.State)
		}
	}
	return ""
}
