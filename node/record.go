package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/node/overlay"
)

// recordVersion is that of records of devices without an overlay, recordOverlay that of the others: a program that does
// not know overlays must not go on with such a device, and refuses to start.
const (
	recordVersion = 1
	recordOverlay = 2
)

// record is what is staged and published of one volume. It is written before the deed, so that after
// a crash the next process knows every mount that there may be.
type record struct {
	Version   int             `json:"version"`
	Boot      string          `json:"boot"` // boot ID of the machine: mounts do not outlive it
	Volume    trivet.VolumeID `json:"volume"`
	Device    uint64          `json:"device,omitempty"`   // number of the block device, 0 = none
	Epoch     trivet.Epoch    `json:"epoch,omitempty"`    // of the block device, 0 = none; see resume.go
	Seen      trivet.Epoch    `json:"seen,omitempty"`     // the volume's, when Epoch was last found; see resume.go
	Overlay   string          `json:"overlay,omitempty"`  // file of the block device's overlay, empty = none
	ReadOnly  bool            `json:"readOnly,omitempty"` // the attachment is
	Staged    *staging        `json:"staged,omitempty"`
	Published []publication   `json:"published,omitempty"`
	// Leaving says that a process which ended had begun to remove the block device: nobody else is going to ask for it.
	Leaving bool `json:"leaving,omitempty"`
}

// noDevice notes that there is no block device.
func (r *record) noDevice() { r.Epoch, r.Overlay, r.Leaving = 0, "", false }

// staging is a StageRequest that was carried out.
type staging struct {
	Path       string   `json:"path"`
	FSType     string   `json:"fsType,omitempty"`
	MountFlags []string `json:"mountFlags,omitempty"`
	Block      bool     `json:"block,omitempty"`
	ReadOnly   bool     `json:"readOnly,omitempty"`
}

func (s *staging) equal(o *staging) bool {
	return s.Path == o.Path && s.FSType == o.FSType && s.Block == o.Block && s.ReadOnly == o.ReadOnly &&
		slices.Equal(s.MountFlags, o.MountFlags)
}

// publication is a PublishRequest that was carried out.
type publication struct {
	Path       string          `json:"path"`
	MountFlags []string        `json:"mountFlags,omitempty"`
	Block      bool            `json:"block,omitempty"`
	ReadOnly   bool            `json:"readOnly,omitempty"`
	Mode       meta.AccessMode `json:"mode,omitempty"`
	// Lost says that the device behind it died; an empty read-only filesystem stands in its place.
	Lost bool `json:"lost,omitempty"`
}

func (p *publication) equal(o *publication) bool {
	return p.Path == o.Path && p.Block == o.Block && p.ReadOnly == o.ReadOnly && p.Mode == o.Mode &&
		slices.Equal(p.MountFlags, o.MountFlags)
}

// at returns the index of the publication at path, or -1.
func (r *record) at(path string) int {
	return slices.IndexFunc(r.Published, func(p publication) bool { return p.Path == path })
}

// live counts the publications with a device behind them.
func (r *record) live() int {
	n := 0
	for _, p := range r.Published {
		if !p.Lost {
			n++
		}
	}
	return n
}

func (r *record) empty() bool { return r.Staged == nil && len(r.Published) == 0 && r.Epoch == 0 }

// dropDevice removes the overlay of a block device that is dead, and forgets both.
func (r *record) dropDevice() error {
	if r.Overlay != "" {
		if err := overlay.Remove(r.Overlay); err != nil {
			return err
		}
	}
	r.noDevice()
	return nil
}

// clone returns a copy that may be changed.
func (r record) clone() record {
	r.Published = slices.Clone(r.Published)
	if r.Staged != nil {
		s := *r.Staged
		r.Staged = &s
	}
	return r
}

// records keeps the records in memory and in a directory, one JSON file a volume. It is safe for
// concurrent use; whoever changes a record holds the volume's keyLock.
type records struct {
	dir  string
	boot string

	mu  sync.Mutex
	all map[trivet.VolumeID]record
}

// openRecords reads what an earlier process of this boot has left. Records of an earlier boot are
// removed: nothing of what they say exists any more.
func openRecords(dir, boot string) (*records, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	r := &records{dir: dir, boot: boot, all: make(map[trivet.VolumeID]record)}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if !strings.HasSuffix(e.Name(), ".json") { // a temporary file of an interrupted write
			if err := os.Remove(path); err != nil {
				return nil, err
			}
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		rec, err := decodeRecord(b)
		if err != nil {
			return nil, fmt.Errorf("record %s (remove it by hand once nothing of the volume is mounted): %w", path, err)
		}
		if rec.Boot == boot {
			r.all[rec.Volume] = rec
		} else if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// decodeRecord returns ErrCorrupt for bytes that no version of this program wrote, ErrInvalid for
// those of a newer one.
func decodeRecord(b []byte) (record, error) {
	var rec record
	if err := json.Unmarshal(b, &rec); err != nil {
		return rec, fmt.Errorf("%w: %w", err, trivet.ErrCorrupt)
	}
	if rec.Version != recordVersion && rec.Version != recordOverlay {
		return rec, fmt.Errorf("version %d, this program reads %d and %d: %w", rec.Version, recordVersion, recordOverlay,
			trivet.ErrInvalid)
	}
	if rec.Volume == trivet.MetaGroup {
		return rec, fmt.Errorf("names no volume: %w", trivet.ErrCorrupt)
	}
	paths := make([]string, 0, len(rec.Published)+1)
	if rec.Staged != nil {
		paths = append(paths, rec.Staged.Path)
	}
	for _, p := range rec.Published {
		paths = append(paths, p.Path)
	}
	if rec.Overlay != "" {
		paths = append(paths, rec.Overlay)
	}
	for _, p := range paths {
		if clean, err := checkPath("recorded", p); err != nil || clean != p {
			return rec, fmt.Errorf("path %q: %w", p, trivet.ErrCorrupt)
		}
	}
	return rec, nil
}

// get returns a copy of a volume's record, an empty one if there is none.
func (r *records) get(id trivet.VolumeID) record {
	r.mu.Lock()
	defer r.mu.Unlock()
	if rec, ok := r.all[id]; ok {
		return rec.clone()
	}
	return record{Version: recordVersion, Boot: r.boot, Volume: id}
}

// list returns the volumes that have a record.
func (r *records) list() []trivet.VolumeID {
	r.mu.Lock()
	defer r.mu.Unlock()
	ids := make([]trivet.VolumeID, 0, len(r.all))
	for id := range r.all {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// put stores a record atomically; an empty one is removed. No fsync: the records are of use only as
// long as the machine does not go down.
func (r *records) put(rec record) error {
	r.mu.Lock() // held over a write to tmpfs, which blocks on nothing
	defer r.mu.Unlock()
	path := filepath.Join(r.dir, rec.Volume.String()+".json")
	if rec.empty() {
		delete(r.all, rec.Volume)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("record of %s: %w", rec.Volume, err)
		}
		return nil
	}
	rec.Version = recordVersion
	if rec.Overlay != "" {
		rec.Version = recordOverlay
	}
	b, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("record of %s: %w", rec.Volume, err)
	}
	tmp := strings.TrimSuffix(path, ".json") + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("record of %s: %w", rec.Volume, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("record of %s: %w", rec.Volume, err)
	}
	r.all[rec.Volume] = rec.clone()
	return nil
}
