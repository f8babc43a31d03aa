package replication

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sort"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// fakeNet answers calls with functions, one per node.
type fakeNet struct {
	mu     sync.Mutex
	nodes  map[trivet.NodeID]func(ctx context.Context, m transport.Message) (reply, error)
	status map[trivet.NodeID]func() RemoteStatus
	called []trivet.NodeID // for anything but a status
	writes []request
}

func (f *fakeNet) Local() trivet.NodeID                     { return "client" }
func (f *fakeNet) Handle(transport.Kind, transport.Handler) {}
func (f *fakeNet) set(node trivet.NodeID, do func() (reply, error)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nodes[node] = func(context.Context, transport.Message) (reply, error) { return do() }
}

func (f *fakeNet) Call(ctx context.Context, to trivet.NodeID, m transport.Message) (transport.Message, error) {
	f.mu.Lock()
	if m.Kind == transport.KindVolumeStatus {
		defer f.mu.Unlock()
		if f.status[to] == nil {
			return transport.Message{}, trivet.ErrUnavailable
		}
		st := f.status[to]()
		return transport.Message{Body: st.append(nil)}, nil
	}
	f.called = append(f.called, to)
	if m.Kind == transport.KindVolumeWrite {
		req, err := decodeWrite(m.Body)
		if err != nil {
			return transport.Message{}, err
		}
		req.data = append([]byte(nil), req.data...)
		f.writes = append(f.writes, req)
	}
	do := f.nodes[to]
	f.mu.Unlock()
	out, err := do(ctx, m)
	if err != nil {
		return transport.Message{}, err
	}
	return transport.Message{Body: out.append(nil)}, nil
}

func silent(ctx context.Context, _ transport.Message) (reply, error) {
	<-ctx.Done()
	return reply{}, ctx.Err()
}

func newFakeVolume(t *testing.T) (*Volume, *fakeNet) {
	t.Helper()
	f := &fakeNet{nodes: map[trivet.NodeID]func(context.Context, transport.Message) (reply, error){}}
	cfg := VolumeConfig{ID: testVolume, SizeBytes: 1 << 30, Epoch: 3, Network: f}
	for _, n := range []trivet.NodeID{"a", "b", "c"} {
		cfg.Members = append(cfg.Members, raftgroup.Member{Node: n, Replica: trivet.ReplicaID("r" + n)})
		f.set(n, func() (reply, error) { return reply{term: 1, epoch: 3}, nil })
	}
	v, err := OpenVolume(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, v.Close()) })
	return v, f
}

func TestVolumeFollowsTheLeader(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		f.set("a", func() (reply, error) { return reply{code: codeNotLeader, node: "c"}, nil })
		require.NoError(t, v.WriteAt(t.Context(), block(1, 0), 0))
		require.NoError(t, v.WriteAt(t.Context(), block(1, 0), 0))
		assert.Equal(t, []trivet.NodeID{"a", "c", "c"}, f.called, "the hint is followed and remembered")
		require.Len(t, f.writes, 3)
		assert.Equal(t, f.writes[0], f.writes[1], "a request is sent again as it was")
		assert.Equal(t, uint64(2), f.writes[2].seq)

		f.set("c", func() (reply, error) { return reply{}, fmt.Errorf("gone: %w", trivet.ErrUnavailable) })
		f.set("a", func() (reply, error) { return reply{code: codeNotLeader}, nil })
		require.NoError(t, v.WriteAt(t.Context(), block(1, 0), 0))
		assert.Equal(t, []trivet.NodeID{"c", "a", "b"}, f.called[3:], "without a hint the members take turns")
		st := v.Stats()
		assert.Equal(t, uint64(3), st.Retries)
		assert.Positive(t, st.LongestPause)
		assert.Zero(t, v.Stats().LongestPause)
	})
}

// A node that is silent costs one attempt, not the whole call.
func TestVolumeLeavesSilentNode(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		f.nodes["a"] = silent
		began := time.Now()
		require.NoError(t, v.WriteAt(t.Context(), block(1, 0), 0))
		assert.Less(t, time.Since(began), 2*attemptMin)
		require.NoError(t, v.Flush(t.Context()))
	})
}

// Whoever waits for a node that fell silent hears of the leader that the others elect meanwhile, although each of them
// named the silent one until then.
func TestVolumeHearsOfANewLeader(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		require.NoError(t, v.WriteAt(t.Context(), block(1, 0), 0)) // a leads, in term 1
		began := time.Now()
		const election = 1300 * time.Millisecond
		status := func() RemoteStatus {
			if time.Since(began) < election {
				return RemoteStatus{LeaderNode: "a", Term: 1}
			}
			return RemoteStatus{LeaderNode: "c", Term: 2}
		}
		f.status = map[trivet.NodeID]func() RemoteStatus{"b": status, "c": status}
		f.nodes["a"] = silent
		f.set("b", func() (reply, error) { return reply{code: codeNotLeader, node: status().LeaderNode}, nil })
		f.set("c", func() (reply, error) {
			if st := status(); st.LeaderNode != "c" {
				return reply{code: codeNotLeader, node: st.LeaderNode}, nil
			}
			return reply{term: 2, epoch: 3}, nil
		})
		var all sync.WaitGroup
		for lba := range int64(20) {
			all.Go(func() {
				assert.NoError(t, v.WriteAt(t.Context(), block(1, 0), lba*trivet.BlockSize))
				assert.Less(t, time.Since(began), election+2*lookEvery)
			})
		}
		all.Wait()
		synctest.Wait()
		assert.Zero(t, v.scout.waiting, "nobody looks any more")
	})
}

// A leader that is slow is waited for, whatever a deposed one says of itself.
func TestVolumeWaitsForASlowLeader(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		f.set("a", func() (reply, error) { return reply{term: 5, epoch: 3}, nil })
		require.NoError(t, v.WriteAt(t.Context(), block(1, 0), 0))
		f.status = map[trivet.NodeID]func() RemoteStatus{
			"b": func() RemoteStatus { return RemoteStatus{LeaderNode: "b", Term: 4} }, // it has slept
			"c": func() RemoteStatus { return RemoteStatus{LeaderNode: "a", Term: 5} },
		}
		f.set("b", func() (reply, error) { return reply{code: codeNotLeader, node: "a"}, nil })
		f.set("c", func() (reply, error) { return reply{code: codeNotLeader, node: "a"}, nil })
		f.nodes["a"] = func(ctx context.Context, _ transport.Message) (reply, error) {
			pause(ctx, attemptMin*3/4)
			return reply{term: 5, epoch: 3}, ctx.Err()
		}
		require.NoError(t, v.WriteAt(t.Context(), block(1, 0), 0))
		assert.Equal(t, []trivet.NodeID{"a", "a"}, f.called)
	})
}

// A reply of a deposed leader is not used, however right it looks (I15, H8).
func TestVolumeRefusesLowerTerm(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		old, now := block(1, 1), block(1, 2)
		f.set("a", func() (reply, error) {
			return reply{term: 4, epoch: 3, data: old, crc: readSum(testVolume, 7, old)}, nil
		})
		f.set("b", func() (reply, error) {
			return reply{term: 5, epoch: 3, data: now, crc: readSum(testVolume, 7, now)}, nil
		})
		require.NoError(t, v.route.accept(5))
		p := make([]byte, trivet.BlockSize)
		require.NoError(t, v.ReadAt(t.Context(), p, 7*trivet.BlockSize))
		assert.Equal(t, now, p)
		assert.Equal(t, []trivet.NodeID{"a", "b"}, f.called)
	})
}

// Blocks that are not the ones asked for are not returned (I12).
func TestVolumeChecksReadReply(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		data := block(1, 1)
		f.set("a", func() (reply, error) {
			return reply{term: 1, epoch: 3, data: data, crc: readSum(testVolume, 8, data)}, nil
		})
		require.ErrorIs(t, v.ReadAt(t.Context(), make([]byte, trivet.BlockSize), 7*trivet.BlockSize), trivet.ErrCorrupt)
	})
}

func TestVolumeFencedForGood(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		f.nodes["a"] = silent
		waiting := make(chan error, 1)
		go func() { waiting <- v.ReadAt(t.Context(), make([]byte, trivet.BlockSize), 0) }()
		synctest.Wait()
		f.set("a", func() (reply, error) { return reply{}, fmt.Errorf("epoch 4: %w", trivet.ErrFenced) })
		require.ErrorIs(t, v.WriteAt(t.Context(), block(1, 0), 0), trivet.ErrFenced)
		require.ErrorIs(t, <-waiting, trivet.ErrFenced, "calls under way end too")
		calledN := len(f.called)
		ctx := t.Context()
		require.ErrorIs(t, v.WriteAt(ctx, block(1, 0), 0), trivet.ErrFenced)
		require.ErrorIs(t, v.ReadAt(ctx, block(1, 0), 0), trivet.ErrFenced)
		require.ErrorIs(t, v.Discard(ctx, 0, 4096), trivet.ErrFenced)
		require.ErrorIs(t, v.WriteZeroes(ctx, 0, 4096), trivet.ErrFenced)
		require.ErrorIs(t, v.Flush(ctx), trivet.ErrFenced)
		assert.Len(t, f.called, calledN)
	})
}

// A write that was given up poisons Flush for good (H14); reads and later writes go on.
func TestVolumeFlushAfterLostWrite(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		for n := range f.nodes {
			f.set(n, func() (reply, error) { return reply{}, trivet.ErrUnavailable })
		}
		require.NoError(t, v.Flush(t.Context()))
		began := time.Now()
		err := v.WriteAt(t.Context(), block(1, 0), 0)
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		assert.Equal(t, ioTimeoutDefault, time.Since(began))
		f.set("a", func() (reply, error) { return reply{term: 1, epoch: 3}, nil })
		for n := range f.nodes {
			f.set(n, func() (reply, error) { return reply{term: 1, epoch: 3}, nil })
		}
		require.NoError(t, v.WriteAt(t.Context(), block(1, 0), 0))
		require.ErrorIs(t, v.Flush(t.Context()), trivet.ErrUnavailable)
		require.ErrorIs(t, v.Flush(t.Context()), trivet.ErrUnavailable)
		last := f.writes[len(f.writes)-1]
		assert.Equal(t, last.seq, last.low, "the lost write is settled: no copy of it may land any more")
	})
}

func TestVolumeClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		f.nodes["a"] = silent
		waiting := make(chan error, 1)
		go func() { waiting <- v.WriteAt(t.Context(), block(1, 0), 0) }()
		synctest.Wait()
		require.NoError(t, v.Close())
		require.ErrorIs(t, <-waiting, trivet.ErrClosed)
		require.ErrorIs(t, v.Flush(t.Context()), trivet.ErrClosed)
		require.NoError(t, v.Close())
	})
}

func TestVolumeSplitsWrites(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		const blockN = 40
		data := block(blockN, 9)
		require.NoError(t, v.WriteAt(t.Context(), data, 12*trivet.BlockSize))
		sort.Slice(f.writes, func(i, j int) bool { return f.writes[i].lba < f.writes[j].lba })
		require.Len(t, f.writes, 4)
		seqs, got := map[uint64]bool{}, []byte(nil)
		for i, want := range []struct{ lba, n uint64 }{{12, 4}, {16, 16}, {32, 16}, {48, 4}} {
			assert.Equal(t, want.lba, uint64(f.writes[i].lba))
			assert.Equal(t, want.n, f.writes[i].arg)
			seqs[f.writes[i].seq] = true
			got = append(got, f.writes[i].data...)
		}
		assert.Len(t, seqs, 4)
		assert.Equal(t, data, got)

		f.writes = nil
		require.NoError(t, v.WriteAt(t.Context(), block(16, 9), 3*trivet.BlockSize))
		assert.Len(t, f.writes, 1, "a write of 64 KiB is one request, wherever it starts")
	})
}

func TestVolumeChecksRanges(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		ctx, size := t.Context(), v.Size()
		require.ErrorIs(t, v.WriteAt(ctx, make([]byte, 100), 0), trivet.ErrInvalid)
		require.ErrorIs(t, v.WriteAt(ctx, block(1, 0), size), trivet.ErrOutOfRange)
		require.ErrorIs(t, v.ReadAt(ctx, block(1, 0), -4096), trivet.ErrInvalid)
		require.ErrorIs(t, v.WriteZeroes(ctx, 1, 4096), trivet.ErrInvalid)
		require.ErrorIs(t, v.Discard(ctx, size, 1), trivet.ErrOutOfRange)
		require.NoError(t, v.Discard(ctx, 1, 4096), "holds no whole block")
		require.NoError(t, v.WriteAt(ctx, nil, 0))
		assert.Empty(t, f.called)
		require.NoError(t, v.Discard(ctx, 4095, 3*4096))
		require.Len(t, f.writes, 1)
		assert.Equal(t, trivet.LBA(1), f.writes[0].lba)
		assert.Equal(t, uint64(2), f.writes[0].arg)

		require.ErrorIs(t, v.SetSize(size-4096), trivet.ErrOutOfRange)
		require.ErrorIs(t, v.SetSize(size+1), trivet.ErrInvalid)
		require.NoError(t, v.SetSize(2*size))
		require.NoError(t, v.WriteAt(ctx, block(1, 0), size))
	})
}

// The caller's context ends the wait with the caller's error.
func TestVolumeCallerLeaves(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, f := newFakeVolume(t)
		f.nodes["a"] = silent
		ctx, cancel := context.WithTimeout(t.Context(), attemptMin/2)
		defer cancel()
		require.ErrorIs(t, v.WriteAt(ctx, block(1, 0), 0), context.DeadlineExceeded)
		require.NoError(t, v.Flush(t.Context()))
	})
}

// low is the lowest sequence without an answer, and none opens beyond the window.
func TestSession(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	s := newSession()
	open := map[uint64]bool{}
	next := uint64(1)
	for range 50_000 {
		lowest := next
		for q := range open {
			lowest = min(lowest, q)
		}
		if len(open) < 40 && rnd.IntN(2) == 0 && next < lowest+windowN {
			seq, low, err := s.begin(t.Context())
			require.NoError(t, err)
			require.Equal(t, next, seq)
			require.Equal(t, min(lowest, seq), low)
			open[seq] = true
			next++
			continue
		}
		for q := range open { // any of them, mostly not the lowest
			if q != lowest || rnd.IntN(40) == 0 {
				s.end(q)
				delete(open, q)
			}
			break
		}
	}
}

func TestSessionWaitsForWindow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSession()
		for range windowN {
			_, _, err := s.begin(t.Context())
			require.NoError(t, err)
		}
		for q := uint64(2); q <= windowN; q++ {
			s.end(q)
		}
		begun := make(chan uint64, 1)
		go func() {
			_, low, err := s.begin(t.Context())
			assert.NoError(t, err)
			begun <- low
		}()
		synctest.Wait()
		require.Empty(t, begun, "sequence 1 is open still")
		s.end(1)
		assert.Equal(t, uint64(windowN+1), <-begun)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range windowN {
			if _, _, err := s.begin(ctx); err != nil {
				require.ErrorIs(t, err, context.Canceled)
				return
			}
		}
		t.Fatal("the window has no end")
	})
}
