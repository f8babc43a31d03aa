package engine_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// script runs one file of commands against one disk.
type script struct {
	t       *testing.T
	fs      *vfs.MemFS
	e       *engine.Engine
	batches map[trivet.VolumeID]*engine.Batch
	images  map[string][]byte
	pinned  map[string]*engine.Image
}

func TestScripts(t *testing.T) {
	datadriven.Walk(t, "testdata/scripts", func(t *testing.T, path string) {
		s := &script{t: t, fs: vfs.NewCrashableMem(), images: map[string][]byte{}, pinned: map[string]*engine.Image{}}
		s.open()
		defer func() { require.NoError(t, s.e.Close()) }()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			out, err := s.run(d)
			if err != nil {
				out += "err: " + err.Error() + "\n"
			}
			if out == "" {
				out = "ok\n"
			}
			return out
		})
	})
}

func (s *script) open() {
	var err error
	s.e, err = engine.Open(config(s.fs))
	require.NoError(s.t, err)
	s.batches = map[trivet.VolumeID]*engine.Batch{}
}

// num is a named number, or def.
func num(t *testing.T, d *datadriven.TestData, key string, def uint64) uint64 {
	if d.HasArg(key) {
		d.ScanArgs(t, key, &def)
	}
	return def
}

func (s *script) run(d *datadriven.TestData) (string, error) {
	id := trivet.VolumeID(num(s.t, d, "vol", 0))
	switch d.Cmd {
	case "create":
		var replica string
		d.ScanArgs(s.t, "replica", &replica)
		return "", s.e.CreateVolume(id, trivet.ReplicaID(replica), int64(num(s.t, d, "blocks", 0))*bs)
	case "drop":
		return "", s.e.DropVolume(id)
	case "flush":
		return "", s.e.Flush()
	case "crash": // everything not synced is lost
		fs := s.fs.CrashClone(vfs.CrashCloneCfg{})
		require.NoError(s.t, s.e.Close())
		s.fs = fs
		s.open()
		return "", nil
	case "volumes":
		ids, err := s.e.Volumes()
		return fmt.Sprintln(ids), err
	}
	v, err := s.e.OpenVolume(id)
	if err != nil {
		return "", err
	}
	switch d.Cmd {
	case "write", "zero", "commit", "abandon":
		return "", s.batch(d, v)
	case "image", "restore", "restore-cut", "pin", "unpin":
		return "", s.image(d, v)
	}
	return s.show(d, v)
}

func (s *script) batch(d *datadriven.TestData, v *engine.Volume) error {
	b := s.batches[v.ID()]
	if b == nil {
		b = v.NewBatch()
		s.batches[v.ID()] = b
	}
	lba, n := trivet.LBA(num(s.t, d, "lba", 0)), int64(num(s.t, d, "n", 1))
	switch d.Cmd {
	case "write":
		p := make([]byte, 0, n*bs)
		for range n {
			p = append(p, block(uint32(num(s.t, d, "data", 0)), lba)...)
		}
		return b.Write(lba, p)
	case "zero":
		return b.Zero(lba, n)
	}
	delete(s.batches, v.ID())
	if d.Cmd == "abandon" {
		return b.Close()
	}
	st := v.State()
	st.AppliedIndex = num(s.t, d, "index", st.AppliedIndex)
	st.AppliedTerm = num(s.t, d, "term", st.AppliedTerm)
	st.Epoch = trivet.Epoch(num(s.t, d, "epoch", uint64(st.Epoch)))
	st.Generation = trivet.Generation(num(s.t, d, "generation", uint64(st.Generation)))
	st.SizeBytes = int64(num(s.t, d, "blocks", uint64(st.SizeBytes/bs))) * bs
	return b.Commit(st)
}

func (s *script) image(d *datadriven.TestData, v *engine.Volume) error {
	var name string
	d.ScanArgs(s.t, "image", &name)
	switch d.Cmd {
	case "pin":
		i, err := v.Image(nil)
		s.pinned[name] = i
		return err
	case "unpin": // reads what was pinned
		i := s.pinned[name]
		b, err := io.ReadAll(i)
		s.images[name] = b
		return errors.Join(err, i.Close())
	case "image":
		i, err := v.Image(nil)
		if err != nil {
			return err
		}
		s.images[name], err = io.ReadAll(i)
		return errors.Join(err, i.Close())
	case "restore-cut":
		return v.Restore(bytes.NewReader(s.images[name][:len(s.images[name])-1]))
	}
	return v.Restore(bytes.NewReader(s.images[name]))
}

func (s *script) show(d *datadriven.TestData, v *engine.Volume) (string, error) {
	describe := func(st engine.State) string {
		return fmt.Sprintf("index=%d term=%d epoch=%d generation=%d blocks=%d restoring=%t\n", st.AppliedIndex,
			st.AppliedTerm, st.Epoch, st.Generation, st.SizeBytes/bs, v.Restoring())
	}
	switch d.Cmd {
	case "state":
		return describe(v.State()), nil
	case "durable":
		st, err := v.DurableState()
		if err != nil {
			return "", err
		}
		return describe(st), nil
	case "read":
		p := make([]byte, int64(num(s.t, d, "n", 1))*bs)
		if err := v.ReadAt(p, trivet.LBA(num(s.t, d, "lba", 0))); err != nil {
			return "", err
		}
		var out []string
		for ; len(p) > 0; p = p[bs:] {
			out = append(out, fmt.Sprint(binary.BigEndian.Uint32(p)))
		}
		return strings.Join(out, " ") + "\n", nil
	case "digest":
		sum, err := v.Digest()
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%x\n", sum), nil
	}
	return "", fmt.Errorf("unknown command %s", d.Cmd)
}
