package replication

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// fakeLog takes proposals and answers each when told to.
type fakeLog struct {
	mu      sync.Mutex
	entries [][]request // decoded, in order of proposal
	answers chan error  // one per entry, in any order
}

func newFakeLog() *fakeLog { return &fakeLog{answers: make(chan error, 1000)} }

func (l *fakeLog) propose(ctx context.Context, data []byte) (any, error) {
	reqs, err := decodeEntry(nil, testVolume, data)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.entries = append(l.entries, reqs)
	l.mu.Unlock()
	select {
	case err := <-l.answers:
		return make([]result, len(reqs)), err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *fakeLog) answer(n int, err error) {
	for range n {
		l.answers <- err
	}
}

// sizes returns how many requests each entry has.
func (l *fakeLog) sizes() (n []int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		n = append(n, len(e))
	}
	return n
}

// submitAll submits requests with sequences 1..n one after the other, without waiting for answers.
func submitAll(t *testing.T, b *batcher, n, blockN int) []chan error {
	t.Helper()
	return submitFrom(t, b, 1, n, blockN)
}

// submitFrom is submitAll from another sequence on.
func submitFrom(t *testing.T, b *batcher, first uint64, n, blockN int) []chan error {
	t.Helper()
	done := make([]chan error, n)
	for i := range n {
		done[i] = make(chan error, 1)
		req := writeReq(1, first+uint64(i), 1, trivet.LBA(i), block(blockN, byte(i)))
		go func() {
			_, err := b.submit(t.Context(), &req)
			done[i] <- err
		}()
		synctest.Wait()
	}
	return done
}

func leadingBatcher(t *testing.T, l *fakeLog) *batcher {
	t.Helper()
	b := newBatcher(t.Context(), testVolume, l.propose)
	b.setLeader(true, 5)
	t.Cleanup(b.close)
	return b
}

func TestBatcherGathersWhileEntriesAreInFlight(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newFakeLog()
		b := leadingBatcher(t, l)
		done := submitAll(t, b, 100, 1)
		assert.Equal(t, []int{1, 1, 32, 32, 32}, l.sizes(), "single blocks: the first two at once, then full entries")
		l.answer(5, nil)
		synctest.Wait()
		assert.Equal(t, []int{1, 1, 32, 32, 32, 2}, l.sizes())
		l.answer(1, nil)
		for _, d := range done {
			require.NoError(t, <-d)
		}
	})
}

// Clients that had their answers together come again one after the other: the first of them does not get an entry of
// its own while as many others are on their way.
func TestBatcherSecondEntryWaitsForItsLike(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newFakeLog()
		b := leadingBatcher(t, l)
		submitAll(t, b, 20, 1)
		l.answer(2, nil)
		synctest.Wait()
		require.Equal(t, []int{1, 1, 18}, l.sizes())
		submitFrom(t, b, 21, 17, 1)
		require.Equal(t, []int{1, 1, 18}, l.sizes(), "one less than are on their way")
		submitFrom(t, b, 38, 1, 1)
		require.Equal(t, []int{1, 1, 18, 18}, l.sizes())
		submitFrom(t, b, 39, 1, 1)
		require.Equal(t, []int{1, 1, 18, 18}, l.sizes())
		l.answer(1, nil)
		synctest.Wait()
		require.Equal(t, []int{1, 1, 18, 18}, l.sizes(), "18 are on their way")
		l.answer(1, nil)
		synctest.Wait()
		require.Equal(t, []int{1, 1, 18, 18, 1}, l.sizes(), "nothing is waited for that is not on its way")
		l.answer(1, nil)
		synctest.Wait()
	})
}

func TestBatcherBoundsEntriesAndQueue(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newFakeLog()
		b := leadingBatcher(t, l)
		n := 2 + 2*(entriesInFlight-2) + queueBytes/trivet.AtomicWriteBytes + 1
		done := submitAll(t, b, n, trivet.AtomicWriteBytes/trivet.BlockSize)
		sizes := l.sizes()
		assert.Len(t, sizes, entriesInFlight)
		for _, s := range sizes[eagerInFlight:] {
			assert.Equal(t, entryDataMax/trivet.AtomicWriteBytes, s)
		}
		require.ErrorIs(t, <-done[n-1], trivet.ErrUnavailable, "one more than the queue holds")
		l.answer(n, nil)
		for _, d := range done[:n-1] {
			require.NoError(t, <-d)
		}
	})
}

// A leader that loses leadership fails its queue at once, as not proposed; what is in the log already
// has the log's answer (H39).
func TestBatcherFailsQueueWithLeadership(t *testing.T) {
	t.Parallel()
	for _, next := range []struct {
		name    string
		leading bool
		term    uint64
	}{{"deposed", false, 6}, {"elected again in a later term", true, 7}} {
		t.Run(next.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				l := newFakeLog()
				b := leadingBatcher(t, l)
				done := submitAll(t, b, 5, 1)
				b.setLeader(next.leading, next.term)
				for _, d := range done[2:] {
					require.ErrorIs(t, <-d, trivet.ErrNotLeader)
				}
				l.answer(2, fmt.Errorf("leadership lost: %w", trivet.ErrUnavailable))
				for _, d := range done[:2] {
					require.ErrorIs(t, <-d, trivet.ErrUnavailable)
				}
				assert.Equal(t, []int{1, 1}, l.sizes(), "no queued request was proposed")
				if !next.leading {
					req := writeReq(1, 9, 1, 0, block(1, 0))
					_, err := b.submit(t.Context(), &req)
					require.ErrorIs(t, err, trivet.ErrNotLeader)
				}
			})
		})
	}
}

func TestBatcherJoinsCopies(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newFakeLog()
		b := leadingBatcher(t, l)
		req := writeReq(1, 1, 1, 0, block(1, 0))
		answers := make(chan error, 3)
		for range 3 {
			go func() {
				copied := req
				term, err := b.submit(t.Context(), &copied)
				assert.Equal(t, uint64(5), term)
				answers <- err
			}()
		}
		synctest.Wait()
		l.answer(1, nil)
		for range 3 {
			require.NoError(t, <-answers)
		}
		assert.Equal(t, []int{1}, l.sizes())
	})
}

// Bytes that changed after the client sealed them stop at the leader, and only they (I12, H25).
func TestBatcherRefusesDamage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newFakeLog()
		b := leadingBatcher(t, l)
		done := submitAll(t, b, 2, 1)
		reqs := make([]request, 4)
		answers := make([]chan error, 4)
		for i := range reqs {
			reqs[i] = writeReq(1, uint64(10+i), 1, 0, block(1, byte(i)))
			if i == 1 || i == 2 {
				reqs[i].data = bytes.Clone(reqs[i].data)
				reqs[i].data[77] ^= 1
			}
			answers[i] = make(chan error, 1)
			go func() {
				_, err := b.submit(t.Context(), &reqs[i])
				answers[i] <- err
			}()
			synctest.Wait()
		}
		l.answer(3, nil)
		for _, d := range done {
			require.NoError(t, <-d)
		}
		require.NoError(t, <-answers[0])
		require.ErrorIs(t, <-answers[1], trivet.ErrCorrupt)
		require.ErrorIs(t, <-answers[2], trivet.ErrCorrupt)
		require.NoError(t, <-answers[3])
		assert.Equal(t, []int{1, 1, 2}, l.sizes())
	})
}

// A caller that leaves has its bytes back: its request is out of the queue, or copied.
func TestBatcherAbandon(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newFakeLog()
		b := leadingBatcher(t, l)
		done := submitAll(t, b, 2, 1)
		ctx, cancel := context.WithCancel(t.Context())
		req := writeReq(1, 3, 1, 0, block(1, 0))
		first, second := make(chan error, 1), make(chan error, 1)
		go func() {
			_, err := b.submit(ctx, &req)
			clear(req.data)
			first <- err
		}()
		synctest.Wait()
		go func() {
			again := writeReq(1, 3, 1, 0, block(1, 0))
			_, err := b.submit(t.Context(), &again)
			second <- err
		}()
		synctest.Wait()
		cancel()
		require.ErrorIs(t, <-first, context.Canceled)
		require.ErrorIs(t, <-second, trivet.ErrUnavailable)
		l.answer(2, nil)
		for _, d := range done {
			require.NoError(t, <-d)
		}
		assert.Equal(t, []int{1, 1}, l.sizes())
		assert.Empty(t, b.byKey)
	})
}

// Callers that leave and use their bytes at once never race with the copy into the entry. The race
// detector is the judge.
func TestBatcherAbandonWhileEncoding(t *testing.T) {
	t.Parallel()
	l := newFakeLog()
	l.answer(1000, nil)
	b := leadingBatcher(t, l)
	for i := range 500 {
		ctx, cancel := context.WithCancel(t.Context())
		req := writeReq(1, uint64(i+1), 1, 0, block(16, byte(i)))
		cancel()
		_, err := b.submit(ctx, &req)
		req.data[77]++
		if err != nil {
			require.ErrorIs(t, err, context.Canceled)
		}
	}
}

func TestBatcherClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newFakeLog()
		b := leadingBatcher(t, l)
		done := submitAll(t, b, 10, 1)
		b.close()
		for _, d := range done {
			require.ErrorIs(t, <-d, trivet.ErrUnavailable)
		}
		req := writeReq(1, 99, 1, 0, block(1, 0))
		_, err := b.submit(t.Context(), &req)
		require.ErrorIs(t, err, trivet.ErrUnavailable)
	})
}
