package overlay

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// Open goes on with the overlay that an earlier process has left, with all that it acknowledged. What it has taken is
// counted, though the Memory may be smaller now. ErrNotFound: there is none. ErrInvalid: a newer version wrote it, or
// it is another volume's. ErrCorrupt: damage. It is left alone then.
func Open(cfg Config) (*Device, error) {
	f, err := os.OpenFile(cfg.Path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("overlay %s: %w", cfg.Path, trivet.ErrNotFound)
	} else if err != nil {
		return nil, fmt.Errorf("overlay: %w", err)
	}
	d := newDevice(cfg, f)
	if err := d.recover(cfg.Volume); err != nil {
		return nil, errors.Join(fmt.Errorf("overlay %s: %w", cfg.Path, err), f.Close())
	}
	d.memory.inherit(int64(d.slotN) / chunkSlotN * chunkBytes)
	d.heldN.Store(int64(len(d.held)))
	return d, nil
}

// recover reads what there is. A chunk that is cut short was never used: its pages come before its slots.
func (d *Device) recover(volume trivet.VolumeID) error {
	page := make([]byte, pageBytes)
	if n, err := d.f.ReadAt(page, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	} else if n < len(page) {
		return fmt.Errorf("%d bytes: %w", n, trivet.ErrCorrupt)
	}
	commit, full, err := decodeHeader(page, volume)
	if err != nil {
		return err
	}
	d.seq = commit
	d.full.Store(full)
	st, err := d.f.Stat()
	if err != nil {
		return err
	}
	chunkN := (st.Size() - pageBytes) / chunkBytes
	if chunkN > 1<<31/chunkSlotN-1 {
		return fmt.Errorf("%d bytes: %w", st.Size(), trivet.ErrCorrupt)
	}
	latest := make(map[trivet.LBA]uint64)
	for c := range chunkN {
		if _, err := d.f.ReadAt(page, chunkAt(c)); err != nil {
			return err
		}
		for range chunkSlotN {
			if err := d.recoverSlot(page[int(d.slotN)%chunkSlotN*headBytes:][:headBytes], latest); err != nil {
				return fmt.Errorf("slot %d: %w", d.slotN, err)
			}
			d.slotN++
		}
	}
	return nil
}

// recoverSlot takes the next slot in, by its head. One that was never committed is cleared, or the next commit would
// make it count.
func (d *Device) recoverSlot(b []byte, latest map[trivet.LBA]uint64) error {
	h, err := decodeHead(b)
	if err != nil {
		return err
	}
	switch {
	case h.seq == 0:
		d.free = append(d.free, d.slotN)
		return nil
	case h.seq > d.seq:
		if _, err := d.f.WriteAt(make([]byte, headBytes), headAt(d.slotN)); err != nil {
			return err
		}
		d.free = append(d.free, d.slotN)
		return nil
	case h.seq < latest[h.lba]:
		d.free = append(d.free, d.slotN)
		return nil
	}
	if old, ok := d.held[h.lba]; ok {
		d.free = append(d.free, old.slot)
	}
	latest[h.lba] = h.seq
	d.held[h.lba] = place{d.slotN, h.crc}
	return nil
}
