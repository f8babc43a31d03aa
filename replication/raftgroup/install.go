package raftgroup

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
)

// The hand-over at the end of a catch-up: state and log of this replica are replaced, while the library
// is stopped. On the disk, in this order (docs/models/catchup.pml):
//
//  1. a record says which snapshot the image stands for that is about to be restored;
//  2. the state machine marks itself as restoring (H5), is restored, and takes the mark off;
//  3. the term is raised, if the snapshot is of a higher one; the vote stays;
//  4. the snapshot is recorded;
//  5. the log is emptied, unless it holds the snapshot's last entry; then it is cut up to there, if damaged before;
//  6. the record of step 1 is removed, and the library may start.
//
// A process that finds the mark of step 2 pulls on. One that finds the record of step 1 and a state at
// its index does steps 3 to 6, and may repeat them. One that finds the record under another state has not
// begun step 2: then log and state are what they were.
//
// An entry that this replica may have acknowledged is never dropped: either the log stays, or the
// snapshot covers it, or it was not committed, because the snapshot has another entry in its place.
//
//	frame (encode.go) over term u64, zero u64, and the snapshot record's own frame

const magicInstall = "trvtins\x02" // version 1 had an image behind it; in no release

// installRecord is what step 1 writes.
type installRecord struct {
	term uint64 // that this replica is at least in
	rec  snapshotRecord
}

func (r installRecord) encode() []byte {
	return sealFrame(magicInstall, append(put64(nil, r.term, 0), r.rec.encode()...))
}

func decodeInstall(raw []byte) (installRecord, error) {
	payload, rest, err := openFrame(magicInstall, raw)
	if err != nil {
		return installRecord{}, err
	}
	d := decoder{b: payload}
	r := installRecord{term: d.u64()}
	zero := d.u64()
	if r.rec, d.b, err = decodeSnapshot(d.b); err != nil {
		return installRecord{}, err
	}
	if err := d.finish("install record"); err != nil {
		return installRecord{}, err
	}
	if len(rest) != 0 || zero != 0 || r.rec.term > r.term {
		return installRecord{}, fmt.Errorf("install record: term %d, snapshot of term %d, %d bytes more: %w",
			r.term, r.rec.term, len(rest), trivet.ErrCorrupt)
	}
	return r, nil
}

// pending returns the record of step 1, if it is there.
func (g *Group) pending() (r installRecord, ok bool, err error) {
	b, err := readFile(g.cfg.FS, g.cfg.Dir, fileInstall, frameBytesMax)
	if isNotExist(err) {
		return installRecord{}, false, nil
	}
	if err == nil {
		r, err = decodeInstall(b)
	}
	if err != nil {
		return installRecord{}, false, fmt.Errorf("file %s: %w", fileInstall, err)
	}
	return r, true, nil
}

// beginInstall does step 1.
func (g *Group) beginInstall(r installRecord) error {
	return g.guard.run("write install record", func() error {
		return writeFile(g.cfg.FS, g.cfg.Dir, fileInstall, r.encode())
	})
}

// endInstall does step 6.
func (g *Group) endInstall() error {
	return g.guard.run("remove install record", func() error {
		return removeFile(g.cfg.FS, g.cfg.Dir, fileInstall)
	})
}

// restored reports whether the state is a whole one, at the index of the record.
func (g *Group) restored(rec snapshotRecord) bool {
	index, _ := g.cfg.Machine.Applied()
	return index == rec.machine && !g.cfg.Machine.Restoring()
}

// resumeInstall is called when the group opens. owing says that the state is not whole, so the library
// must not start.
func (g *Group) resumeInstall() (owing bool, err error) {
	if err := removeFile(g.cfg.FS, g.cfg.Dir, fileInstall+tmpSuffix); err != nil {
		return false, err
	}
	r, ok, err := g.pending()
	switch {
	case err != nil:
		return false, err
	case g.cfg.Machine.Restoring():
		return true, nil
	case ok && g.restored(r.rec):
		return false, g.finishInstall(r)
	case ok:
		return false, g.endInstall()
	}
	return false, nil
}

// finishInstall does steps 3 to 6. REQUIRES: the library is stopped, and the state restored.
func (g *Group) finishInstall(r installRecord) error {
	if err := g.stable.setTerm(r.term); err != nil {
		return err
	}
	holds := g.holds(r.rec)
	if g.snaps.record().index < r.rec.index {
		if err := g.snaps.put(r.rec); err != nil {
			return err
		}
	}
	// A log that stays must be on disk up to the snapshot before the record goes: else a crash leaves a
	// state ahead of its log (H4; docs/models, "start before a kept log is durable").
	if holds {
		if err := g.store.durable.wait(context.Background(), r.rec.index); err != nil {
			return err
		}
		if err := g.closeHoles(r.rec.index); err != nil {
			return err
		}
	} else {
		if err := g.store.install(r.rec.index, r.rec.config); err != nil {
			return err
		}
		g.found = damage{}
		g.isHoley()
	}
	g.fsm.setConfig(r.rec.config)
	if err := errors.Join(g.endInstall(), g.guard.failed()); err != nil {
		return err
	}
	g.log.Info("snapshot restored", "index", r.rec.index, "term", r.rec.term, "logKept", holds)
	return nil
}

// closeHoles cuts a log that stays, if anything of it is damaged up to the snapshot.
func (g *Group) closeHoles(index uint64) error {
	damaged := slices.Concat(g.found.rot, g.found.holes)
	if !slices.ContainsFunc(damaged, func(i uint64) bool { return i <= index }) {
		return nil
	}
	if err := g.cutTo(index); err != nil {
		return err
	}
	gone := func(i uint64) bool { return i <= index }
	g.found.rot, g.found.holes = slices.DeleteFunc(g.found.rot, gone), slices.DeleteFunc(g.found.holes, gone)
	g.isHoley()
	return nil
}

// holds reports whether the log goes on from the snapshot's last entry: it has that entry, or was emptied
// at it.
func (g *Group) holds(rec snapshotRecord) bool {
	if term, ok := g.seglog.term(rec.index); ok {
		return term == rec.term
	}
	first, _ := g.seglog.bounds()
	own := g.snaps.record()
	return first == rec.index+1 && own.index == rec.index && own.term == rec.term
}

// has returns an entry at or beyond the snapshot up to which this replica's state and log go; ok is false
// when something is missing up to the snapshot itself. An entry of the log counts: a leader may go on from
// it, and this replica may have acknowledged what follows.
func (g *Group) has(rec snapshotRecord) (at logPosition, ok bool) {
	if term, ok := g.seglog.term(rec.index); ok && term == rec.term {
		return logPosition{term: rec.term, index: rec.index}, true
	}
	own := g.snaps.record()
	return logPosition{term: own.term, index: own.index}, own.index >= rec.index
}
