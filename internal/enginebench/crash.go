package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

const (
	// victimArg makes this program the process that is killed; what it is to do follows, as JSON.
	victimArg = "victim"
	// victimReady is the line that it writes once everything is on the disk.
	victimReady = "ready"

	// applyTogether is how many entries a replica applies as one batch, at most.
	applyTogether = 32
	// liveTogether is how many live blocks are put into the map at once.
	liveTogether = 1024
)

// victimTask is what the process that is killed prepares.
type victimTask struct {
	Dir          string
	SegmentBytes int64
	SizeBytes    int64
	EntryBlocks  int
	LiveBlocks   int64
	Entries      int64 // that are logged and not applied
}

func (t *victimTask) config() storeConfig {
	return storeConfig{dir: t.Dir, refs: true, segmentBytes: t.SegmentBytes}
}

// crash has a process make a store and entries that it has not applied, kills it, and times the start from what is left
// on the disk.
func (b *bench) crash(dir string) error {
	o := &b.o
	entryBytes := int64(o.entryBlocks) * trivet.BlockSize
	t := victimTask{
		Dir: dir, SegmentBytes: o.segmentMiB << 20, SizeBytes: o.largeMiB << 20, EntryBlocks: o.entryBlocks,
		LiveBlocks: int64(o.openBlocks), Entries: max(o.backlogMiB<<20/entryBytes, 1),
	}
	b.note("crash: a process writes %d live blocks and %d MiB of entries, and is killed", t.LiveBlocks, o.backlogMiB)
	if err := killed(t); err != nil {
		return err
	}
	if err := forget(filepath.Join(dir, "engine")); err != nil {
		return err
	}
	b.note("crash: start")
	began := time.Now()
	s, r, err := openOne(t.config(), t.SizeBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	opened := time.Since(began)
	n, err := r.catchUp()
	took := time.Since(began)
	if err == nil && n != t.Entries {
		err = fmt.Errorf("%d entries were applied, want %d", n, t.Entries)
	}
	if err != nil {
		return err
	}
	all := fmt.Sprintf("all, s: %g GiB, %d live blocks, %d MiB to apply", float64(o.largeMiB)/1024, o.openBlocks,
		o.backlogMiB)
	printFigures(b.out, "start after a crash", "", []figure{
		alone("the log is open, s", 2, s.logTook.Seconds(), wanted{}),
		alone("the map is open, s", 2, s.engTook.Seconds(), wanted{}),
		alone("entries are read and applied, s", 2, (took - opened).Seconds(), wanted{}),
		alone(all, 2, took.Seconds(), atMost(5)),
	})
	return nil
}

// killed runs the process that prepares the store, and kills it with SIGKILL once everything is on the disk.
func killed(t victimTask) (err error) {
	task, err := json.Marshal(t)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, victimArg, string(task)) //nolint:noctx // killed below
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil && line != victimReady+"\n" {
		err = fmt.Errorf("the process says %q", line)
	}
	if err == nil {
		err = cmd.Process.Kill()
	}
	waitErr := errors.Join(in.Close(), cmd.Wait())
	if err != nil {
		return fmt.Errorf("prepare the store that is killed: %w", errors.Join(err, waitErr))
	}
	return nil
}

// victim prepares the store, says so, and waits to be killed.
func victim(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 1 {
		return fmt.Errorf("%s: %d arguments: %w", victimArg, len(args), trivet.ErrInvalid)
	}
	var t victimTask
	if err := json.Unmarshal([]byte(args[0]), &t); err != nil {
		return fmt.Errorf("%s: %w", victimArg, err)
	}
	s, err := t.prepare()
	if err != nil {
		return err
	}
	fmt.Fprintln(out, victimReady)
	_, err = io.Copy(io.Discard, in)
	return errors.Join(err, s.close(), errors.New("nobody killed it"))
}

func (t *victimTask) prepare() (*store, error) {
	s, r, err := openOne(t.config(), t.SizeBytes)
	if err != nil {
		return nil, err
	}
	bufs := payloads(8, t.EntryBlocks*trivet.BlockSize, newRand(7))
	if err = r.fillSparse(t, bufs[0]); err == nil {
		err = r.logOnly(t, bufs)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// fillSparse puts live blocks all over the volume. They stand in few places: a start reads the map only. Then the map
// is on the disk, and the log empty.
func (r *replica) fillSparse(t *victimTask, payload []byte) error {
	next := spread(r.blockN, t.LiveBlocks)
	lbas := make([]trivet.LBA, t.EntryBlocks)
	next(lbas)
	if err := r.entry(lbas, payload); err != nil {
		return err
	}
	at, err := r.grp.Locate(r.st.AppliedIndex)
	if err != nil {
		return err
	}
	defer r.s.log.Unpin(at.Segment)
	for done := int64(t.EntryBlocks); done < t.LiveBlocks; {
		b := r.vol.NewBatch()
		for k := 0; k < liveTogether && done < t.LiveBlocks; k += t.EntryBlocks {
			next(lbas)
			if err := r.referAt(b, at, lbas, payload); err != nil {
				return errors.Join(err, b.Close())
			}
			done += int64(t.EntryBlocks)
		}
		if err := r.commit(b, r.st.AppliedIndex+1); err != nil {
			return err
		}
	}
	if err := r.s.eng.Flush(); err != nil {
		return err
	}
	return r.grp.TrimPrefix(r.st.AppliedIndex)
}

// logOnly appends entries with blocks at random places, and applies none.
func (r *replica) logOnly(t *victimTask, bufs [][]byte) error {
	next, index := atRandom(r.blockN, newRand(8)), r.st.AppliedIndex
	lbas := make([]trivet.LBA, t.EntryBlocks)
	entryBytes := int64(t.EntryBlocks) * (trivet.BlockSize + 16) // with what describes each
	together := max((r.s.log.AppendBytesMax()-4*trivet.BlockSize)/(entryBytes+64), 1)
	for left := t.Entries; left > 0; {
		n := min(together, left)
		entries := make([]segment.Entry, n)
		for i := range entries {
			next(lbas)
			index++
			e := segment.Entry{Index: index, Term: 1, Payload: bufs[int(index)%len(bufs)]}
			for _, lba := range lbas {
				e.Blocks = append(e.Blocks, segment.BlockInfo{LBA: lba})
			}
			entries[i] = e
		}
		if err := r.grp.Append(entries); err != nil {
			return err
		}
		left -= n
	}
	return nil
}

// catchUp reads and applies what the log has and the volume does not, and returns how many entries that were.
func (r *replica) catchUp() (n int64, err error) {
	_, last := r.grp.FirstLast()
	var lbas []trivet.LBA
	for index := r.st.AppliedIndex + 1; index <= last; {
		b := r.vol.NewBatch()
		to := min(index+applyTogether-1, last)
		for ; index <= to; index++ {
			e, err := r.grp.Read(index)
			if err == nil {
				lbas = lbas[:0]
				for _, x := range e.Blocks {
					lbas = append(lbas, x.LBA)
				}
				err = r.refer(b, index, lbas, e.Payload)
			}
			if err != nil {
				return n, errors.Join(err, b.Close())
			}
			n++
		}
		if err := r.commit(b, to); err != nil {
			return n, err
		}
	}
	return n, nil
}
