package replication

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// script runs the scripts in testdata/core against a core and a map of blocks. Commands:
//
//	new size=<blocks>
//	fence epoch= [w0=] [w1=]: with the epochs at which the sessions of two writers began
//	wipe epoch=  ·  resize blocks=
//	freeze epoch= id=  ·  drop id=  ·  rollback epoch= id=
//	write|discard|zeroes epoch= seq= low= lba= [n=] [data=] [writer=]
//	reload      store the state as the engine would and load it again
//	show        epoch, size, mark and the blocks that are not zero
type script struct {
	core   core
	blocks map[trivet.LBA]string
}

func TestCoreScripts(t *testing.T) {
	t.Parallel()
	datadriven.Walk(t, "testdata/core", func(t *testing.T, path string) {
		s := &script{}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string { return s.run(t, d) })
	})
}

func (s *script) run(t *testing.T, d *datadriven.TestData) string {
	t.Helper()
	num := func(key string, def uint64) uint64 {
		if d.HasArg(key) {
			d.ScanArgs(t, key, &def)
		}
		return def
	}
	switch d.Cmd {
	case "new":
		s.core = core{sizeBytes: int64(num("size", 0)) * trivet.BlockSize, win: newWindow()}
		s.blocks = map[trivet.LBA]string{}
		return "ok"
	case "reload":
		before := s.core
		require.NoError(t, s.core.loadSessions(before.appendSessions(nil)))
		require.Equal(t, before, s.core)
		return "ok"
	case "show":
		return s.show()
	}
	req := request{
		epoch: trivet.Epoch(num("epoch", 0)), seq: num("seq", 0), low: num("low", 0), lba: trivet.LBA(num("lba", 0)),
	}
	data := ""
	switch d.Cmd {
	case "fence":
		req.op = opFence
		if d.HasArg("w0") || d.HasArg("w1") {
			req.op, req.seq, req.low = opFenceWriters, num("w0", 0), num("w1", 0)
		}
	case "wipe":
		req.op = opWipe
	case "resize":
		req.op, req.arg = opResize, num("blocks", 0)*trivet.BlockSize
	case "freeze":
		req.op, req.arg = opFreeze, num("id", 0)
	case "drop":
		req.op, req.arg = opDrop, num("id", 0)
	case "rollback":
		req.op, req.arg = opRollback, num("id", 0)
	case "discard":
		req.op, req.arg = opDiscard, num("n", 1)
	case "zeroes":
		req.op, req.arg = opWriteZeroes, num("n", 1)
	case "write":
		req.op, req.arg = opWrite, num("n", 1)
		req.data = make([]byte, req.arg*trivet.BlockSize)
		d.ScanArgs(t, "data", &data)
	default:
		d.Fatalf(t, "unknown command")
	}
	if req.op.sessioned() {
		if req.low == 0 {
			req.low = req.seq
		}
		writer := num("writer", 0) << 63
		req.seq, req.low = req.seq|writer, req.low|writer
	}
	require.NoError(t, req.check())
	return s.step(&req, data)
}

func (s *script) step(req *request, data string) string {
	res, ch := s.core.step(req)
	for i := range trivet.LBA(ch.blockN) {
		switch ch.effect {
		case effectWrite:
			s.blocks[ch.lba+i] = data
		case effectZero:
			delete(s.blocks, ch.lba+i)
		case effectNone, effectBack:
		}
	}
	err := res.err(req)
	switch {
	case err != nil:
		return "err: " + err.Error()
	case res.out == outDuplicate:
		return "ok (nothing to do)"
	}
	return "ok"
}

func (s *script) show() string {
	var b strings.Builder
	blockN := s.core.sizeBytes / trivet.BlockSize
	fmt.Fprintf(&b, "epoch=%d blocks=%d", s.core.epoch, blockN)
	if s.core.win != nil {
		fmt.Fprintf(&b, " mark=%d", s.core.win.mark)
	}
	if s.core.win1 != nil {
		fmt.Fprintf(&b, " mark1=%d", s.core.win1.mark)
	}
	if s.core.generation > 0 {
		fmt.Fprintf(&b, " generation=%d", s.core.generation)
	}
	for _, x := range s.core.snapshots {
		fmt.Fprintf(&b, " snapshot %d of %d", x.ID, x.Generation)
	}
	b.WriteString("\n")
	for lba := range trivet.LBA(blockN) {
		if data, ok := s.blocks[lba]; ok {
			fmt.Fprintf(&b, "%d: %s\n", lba, data)
		}
	}
	return b.String()
}

// Every refusal reaches the client with a sentinel that tells it what to do.
func TestResultErrors(t *testing.T) {
	t.Parallel()
	req := &request{op: opWrite}
	want := map[outcome]error{
		outApplied: nil, outDuplicate: nil, outFenced: trivet.ErrFenced, outNotYet: trivet.ErrInvalid,
		outStale: trivet.ErrInvalid, outRange: trivet.ErrOutOfRange, outShrink: trivet.ErrOutOfRange,
		outFull: trivet.ErrNoSpace, outUnknown: trivet.ErrNotFound, outStranger: trivet.ErrInvalid,
	}
	for out, sentinel := range want {
		if err := (result{out: out}).err(req); !errors.Is(err, sentinel) {
			t.Errorf("outcome %d gives %v, want %v", out, err, sentinel)
		}
	}
}
