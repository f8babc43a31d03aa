package raftgroup

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// Golden files are written anew by: go test -run Golden -rewrite.
var rewrite = flag.Bool("rewrite", false, "rewrite golden files")

func testMembers() []Member {
	return []Member{{Replica: idA, Node: "node-a"}, {Replica: idB, Node: "node-b.example", Learner: true}}
}

func goldenSnapshot() snapshotRecord {
	return snapshotRecord{index: 100, term: 7, machine: 98, config: groupConfig{42, testMembers()}}
}

func goldenAppend() *raft.AppendEntriesRequest {
	return &raft.AppendEntriesRequest{
		Term: 9, PrevLogEntry: 41, PrevLogTerm: 8, LeaderCommitIndex: 40,
		Entries: []*raft.Log{
			{Index: 42, Term: 8, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(toConfiguration(testMembers()))},
			{Index: 43, Term: 9, Type: raft.LogNoop, Data: []byte{}},
			{Index: 44, Term: 9, Type: raft.LogCommand, Data: []byte("a block")},
		},
	}
}

// formats are all encodings that reach a disk or the wire, with one value each.
func formats(t *testing.T) map[string][]byte {
	t.Helper()
	app, err := encodeAppend(goldenAppend())
	require.NoError(t, err)
	entry, err := encodeEntryReply(goldenAppend().Entries[2])
	require.NoError(t, err)
	return map[string][]byte{
		"superblock":   superblock{group: 0x0123456789abcdef, replica: idA, members: testMembers()}.encode(),
		"snapshot":     goldenSnapshot().encode(),
		"install":      installRecord{9, goldenSnapshot()}.encode(),
		"append":       app,
		"append-reply": appendReply{9, 44, true, true, 77, time.Second}.encode(),
		"vote":         voteRequest{10, 44, 9, byTransfer}.encode(),
		"verdict":      verdict{9, true}.encode(),
		"timeout-now":  timeoutNow{9, 77}.encode(),
		"standing-ask": standingRequest{9}.encode(),
		"standing":     standing{9, logPosition{8, 44}, true}.encode(),
		"transfer":     transferNotice{9, idB}.encode(),
		"fetch":        fetchAsk{9, goldenSnapshot()}.encode(),
		"fetch-reply":  fetchReply{9, true, logPosition{7, 100}}.encode(),
		"image-open":   imageOpen{[]byte("want")}.encode(),
		"image-opened": imageOpened{5, 1 << 40, 1 << 19, goldenSnapshot()}.encode(),
		"image-read":   imageRead{5, 1 << 20}.encode(),
		"image-piece":  imagePiece{1 << 20, true, []byte("image")}.encode(),
		"image-close":  imageClose{5, true}.encode(),
		"entry-ask":    entryAsk{44, 9}.encode(),
		"entry-reply":  entry,
	}
}

// A change of these bytes is a change of a format: it needs a new version, and the old one must
// stay readable.
func TestGolden(t *testing.T) {
	for name, got := range formats(t) {
		path := filepath.Join("testdata", "v1", name+".hex")
		if *rewrite {
			require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
			require.NoError(t, os.WriteFile(path, []byte(hex.Dump(got)), 0o644))
		}
		want, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, string(want), hex.Dump(got), name)
	}
}

// roundTrip decodes with the decoder of a format and encodes again.
func roundTrip(name string, b []byte) ([]byte, error) {
	switch name {
	case "superblock":
		v, err := decodeSuperblock(b)
		return v.encode(), err
	case "snapshot":
		v, rest, err := decodeSnapshot(b)
		return append(v.encode(), rest...), err
	case "install":
		v, err := decodeInstall(b)
		return v.encode(), err
	case "append":
		v, err := decodeAppend(b)
		if err != nil {
			return nil, err
		}
		return encodeAppend(v)
	case "append-reply":
		v, err := decodeAppendReply(b)
		return v.encode(), err
	case "vote":
		v, err := decodeVote(b)
		return v.encode(), err
	case "verdict":
		v, err := decodeVerdict(b)
		return v.encode(), err
	case "timeout-now":
		v, err := decodeTimeoutNow(b)
		return v.encode(), err
	case "standing-ask":
		v, err := decodeStandingRequest(b)
		return v.encode(), err
	case "standing":
		v, err := decodeStanding(b)
		return v.encode(), err
	case "transfer":
		v, err := decodeTransferNotice(b)
		return v.encode(), err
	case "fetch":
		v, err := decodeFetchAsk(b)
		return v.encode(), err
	case "fetch-reply":
		v, err := decodeFetchReply(b)
		return v.encode(), err
	case "image-open":
		v, err := decodeImageOpen(b)
		return v.encode(), err
	case "image-opened":
		v, err := decodeImageOpened(b)
		return v.encode(), err
	case "image-read":
		v, err := decodeImageRead(b)
		return v.encode(), err
	case "image-piece":
		v, err := decodeImagePiece(b)
		return v.encode(), err
	case "image-close":
		v, err := decodeImageClose(b)
		return v.encode(), err
	case "entry-ask":
		v, err := decodeEntryAsk(b)
		return v.encode(), err
	case "entry-reply":
		v, err := decodeEntryReply(b)
		if err != nil {
			return nil, err
		}
		return encodeEntryReply(v)
	}
	return nil, fmt.Errorf("no format %q", name)
}

// Every format reads back what it wrote, and refuses every cut and every flipped bit.
func TestFormats(t *testing.T) {
	for name, b := range formats(t) {
		again, err := roundTrip(name, b)
		require.NoError(t, err, name)
		require.Equal(t, b, again, name)
		for n := range b {
			_, err := roundTrip(name, b[:n])
			require.Error(t, err, "%s cut to %d bytes", name, n)
		}
		for at := range b {
			c := bytes.Clone(b)
			c[at] ^= 0x08
			_, err := roundTrip(name, c)
			require.Error(t, err, "%s with a flipped bit at %d", name, at)
		}
	}
}

func TestOutcome(t *testing.T) {
	require.NoError(t, outcome(nil))
	for _, definite := range []error{raft.ErrNotLeader, raft.ErrEnqueueTimeout, raft.ErrLeadershipTransferInProgress} {
		require.ErrorIs(t, outcome(definite), trivet.ErrNotLeader)
		require.NotErrorIs(t, outcome(definite), trivet.ErrUnavailable)
	}
	for _, unknown := range []error{raft.ErrLeadershipLost, raft.ErrRaftShutdown, errors.New("store entries: bad")} {
		require.ErrorIs(t, outcome(unknown), trivet.ErrUnavailable)
		require.NotErrorIs(t, outcome(unknown), trivet.ErrNotLeader)
	}
	require.ErrorIs(t, outcome(context.Canceled), context.Canceled)
}

// Bytes that pass the checksum but mean nonsense: the library must never see them.
func TestAppendRefusesNonsense(t *testing.T) {
	for name, change := range map[string]func(*raft.AppendEntriesRequest){
		"type":            func(r *raft.AppendEntriesRequest) { r.Entries[1].Type = 9 },
		"deprecated type": func(r *raft.AppendEntriesRequest) { r.Entries[1].Type = raft.LogAddPeerDeprecated },
		"configuration":   func(r *raft.AppendEntriesRequest) { r.Entries[0].Data = []byte("junk") },
		"empty config":    func(r *raft.AppendEntriesRequest) { r.Entries[0].Data = nil },
		"no voters": func(r *raft.AppendEntriesRequest) {
			r.Entries[0].Data = raft.EncodeConfiguration(toConfiguration(testMembers()[1:]))
		},
		"term falls":   func(r *raft.AppendEntriesRequest) { r.Entries[2].Term = 7 },
		"term ahead":   func(r *raft.AppendEntriesRequest) { r.Entries[2].Term = 10 },
		"term zero":    func(r *raft.AppendEntriesRequest) { *r = raft.AppendEntriesRequest{} },
		"entry size":   func(r *raft.AppendEntriesRequest) { r.Entries[2].Data = make([]byte, EntryBytesMax+1) },
		"many entries": func(r *raft.AppendEntriesRequest) { r.Entries = manyEntries(appendEntriesMax + 1) },
	} {
		r := goldenAppend()
		change(r)
		b, err := encodeAppend(r)
		require.NoError(t, err, name)
		_, err = decodeAppend(b)
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
	}
	r := goldenAppend()
	r.Entries[1].Index = 50
	_, err := encodeAppend(r)
	require.Error(t, err, "a gap")
}

func manyEntries(n int) []*raft.Log {
	var out []*raft.Log
	for i := range n {
		out = append(out, &raft.Log{Index: 42 + uint64(i), Term: 9})
	}
	return out
}

func TestBound(t *testing.T) {
	r := &raft.AppendEntriesRequest{}
	for i := range 10 {
		r.Entries = append(r.Entries, &raft.Log{Index: uint64(i + 1), Data: make([]byte, 1<<20)})
	}
	bound(r)
	require.Len(t, r.Entries, 4)
	r.Entries = []*raft.Log{{Data: make([]byte, appendBytesMax+1)}, {}}
	bound(r)
	require.Len(t, r.Entries, 1, "one entry is always sent")
}

// fuzzFormat checks that a decoder neither panics nor accepts what it would write differently.
func fuzzFormat(f *testing.F, name string) {
	t := &testing.T{}
	f.Add(formats(t)[name])
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, in := range [][]byte{b, sealBody(bytes.Clone(b))} {
			again, err := roundTrip(name, in)
			if err == nil {
				require.Equal(t, in[:min(len(in), len(again))], again)
			}
		}
	})
}

func FuzzSuperblock(f *testing.F)  { fuzzFormat(f, "superblock") }
func FuzzSnapshot(f *testing.F)    { fuzzFormat(f, "snapshot") }
func FuzzInstall(f *testing.F)     { fuzzFormat(f, "install") }
func FuzzAppend(f *testing.F)      { fuzzFormat(f, "append") }
func FuzzAppendReply(f *testing.F) { fuzzFormat(f, "append-reply") }
func FuzzVote(f *testing.F)        { fuzzFormat(f, "vote") }
func FuzzVerdict(f *testing.F)     { fuzzFormat(f, "verdict") }
func FuzzTimeoutNow(f *testing.F)  { fuzzFormat(f, "timeout-now") }
func FuzzFetch(f *testing.F)       { fuzzFormat(f, "fetch") }
func FuzzFetchReply(f *testing.F)  { fuzzFormat(f, "fetch-reply") }
func FuzzImageOpen(f *testing.F)   { fuzzFormat(f, "image-open") }
func FuzzImageOpened(f *testing.F) { fuzzFormat(f, "image-opened") }
func FuzzImageRead(f *testing.F)   { fuzzFormat(f, "image-read") }
func FuzzImagePiece(f *testing.F)  { fuzzFormat(f, "image-piece") }
func FuzzImageClose(f *testing.F)  { fuzzFormat(f, "image-close") }
func FuzzEntryAsk(f *testing.F)    { fuzzFormat(f, "entry-ask") }
func FuzzEntryReply(f *testing.F)  { fuzzFormat(f, "entry-reply") }

// FuzzConfiguration: the library's decoder panics on some bytes; ours must not.
func FuzzConfiguration(f *testing.F) {
	f.Add(raft.EncodeConfiguration(toConfiguration(testMembers())))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := decodeConfiguration(b); err == nil {
			require.NoError(t, validateMembers(m))
		}
	})
}
