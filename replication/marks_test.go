package replication

import (
	"context"
	"encoding/hex"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

const markName = 0x1122334455667788

func markReq() request { return sealed(request{op: opMark, arg: markName}) }

// markLog is five entries, the third of which is a mark.
func markLog() []raftgroup.Entry {
	reqs := []request{
		sealed(request{op: opFence, epoch: 1}),
		writeReq(1, 1, 1, 0, block(4, 1)),
		markReq(),
		writeReq(1, 2, 2, 2, block(4, 9)),
		zeroReq(opDiscard, 1, 3, 3, 0, 1),
	}
	var log []raftgroup.Entry
	for i, r := range reqs {
		log = append(log, raftgroup.Entry{Index: uint64(i + 1), Term: 1, Data: appendEntry(nil, testVolume, []request{r})})
	}
	return log
}

// The bytes of a mark in the log stay readable for ever, and its form is checked.
func TestMarkEntry(t *testing.T) {
	t.Parallel()
	b := appendEntry(nil, testVolume, []request{markReq()})
	assert.Equal(t, "0100000100000000"+"0102030405060708"+
		"10000000"+hex.EncodeToString(b[20:24])+"0000000000000000"+"0000000000000000"+"0000000000000000"+
		"0000000000000000"+"1122334455667788", hex.EncodeToString(b))
	got, err := decodeEntry(nil, testVolume, b)
	require.NoError(t, err)
	assert.Equal(t, []request{{op: opMark, arg: markName, crc: got[0].crc, data: []byte{}}}, got)
	assert.Equal(t, "mark", opMark.String())
	for _, bad := range []request{
		{op: opMark}, {op: opMark, arg: 1, epoch: 1}, {op: opMark, arg: 1, seq: 1, low: 1}, {op: opMark, arg: 1, lba: 1},
	} {
		require.ErrorIs(t, bad.check(), trivet.ErrInvalid)
	}
}

// A machine that awaits a mark has the digest of exactly that index, though it is given the mark amid others; one
// that does not await it is none the worse.
func TestMarkPinsItsIndex(t *testing.T) {
	t.Parallel()
	log := markLog()
	short, awaits, other := newTestMachine(t), newTestMachine(t), newTestMachine(t)
	_, err := short.Apply(log[:3])
	require.NoError(t, err)
	want := short.digest(t)
	image := awaits.marks.image
	awaits.marks.image = func() (markedImage, error) {
		applied, _ := awaits.Applied()
		assert.Less(t, applied, uint64(3), "who shows that it has applied a mark has pinned at it")
		return image()
	}
	require.NoError(t, awaits.marks.await(markName))
	require.NoError(t, awaits.marks.await(markName), "again")
	for _, m := range []*testMachine{awaits, other} {
		res, err := m.Apply(log)
		require.NoError(t, err)
		require.Len(t, res, len(log))
		for _, r := range res {
			assert.Equal(t, outApplied, r.([]result)[0].out)
		}
		applied, term := m.Applied()
		assert.Equal(t, []uint64{5, 1}, []uint64{applied, term})
	}
	assert.Equal(t, awaits.digest(t), other.digest(t))
	awaits.marks.jobs.Wait()
	got := awaits.marks.ask(markName, 5, 0)
	assert.Equal(t, markTaken, got.state)
	assert.Equal(t, uint64(3), got.index)
	assert.Equal(t, want, got.digest)
	assert.Equal(t, markUnknown, other.marks.ask(markName, 5, 0).state)
	require.NoError(t, awaits.vol.Restore(mustImage(t, other)), "a pinned mark is in nobody's way")
	awaits.marks.close()
	require.ErrorIs(t, awaits.marks.await(7), trivet.ErrUnavailable)
	other.marks.close()
	short.marks.close()
}

func mustImage(t *testing.T, m *testMachine) raftgroup.Image {
	t.Helper()
	img, err := m.Image(nil)
	require.NoError(t, err)
	t.Cleanup(func() { _ = img.Close() })
	return img
}

// fakeImage is one whose digest takes three steps, or fails.
type fakeImage struct {
	err    error
	closed chan struct{}
}

func (f *fakeImage) Digest(pace func(int) error) ([32]byte, error) {
	for range 3 {
		if err := pace(100); err != nil {
			return [32]byte{}, err
		}
	}
	return [32]byte{1}, f.err
}

func (f *fakeImage) Close() error {
	close(f.closed)
	return nil
}

// A mark is forgotten, and its image given back, once nobody asks about it, once it is dropped, and at the end.
func TestMarkLetsGo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for name, end := range map[string]func(k *marks){
			"idle":  func(*marks) { time.Sleep(markIdle) }, //nolint:forbidigo // in a bubble
			"drop":  func(k *marks) { k.drop(1) },
			"close": (*marks).close,
		} {
			img := &fakeImage{closed: make(chan struct{})}
			k := newMarks(testVolume, func() (markedImage, error) { return img, nil })
			k.background = func(ctx context.Context, _ int) (func(), error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			require.NoError(t, k.await(1))
			time.Sleep(markIdle * 3 / 4) //nolint:forbidigo // in a bubble
			assert.Equal(t, markAwaited, k.ask(1, 0, 0).state, "asking keeps it")
			assert.True(t, k.awaits(1))
			assert.False(t, k.awaits(2))
			k.pin(1, 9)
			assert.False(t, k.awaits(1), "a copy of the mark in the log is not another one")
			time.Sleep(markIdle * 3 / 4) //nolint:forbidigo // in a bubble
			assert.Equal(t, markTaking, k.ask(1, 0, 0).state)
			end(k)
			synctest.Wait()
			select {
			case <-img.closed:
			default:
				t.Errorf("%s: the image is still pinned", name)
			}
			assert.Equal(t, markUnknown, k.ask(1, 0, 0).state, name)
			k.close()
		}
	})
}

// Turns are taken and given back, progress is told, and there is a limit.
func TestMarkTakesTurns(t *testing.T) {
	t.Parallel()
	img := &fakeImage{closed: make(chan struct{})}
	k := newMarks(testVolume, func() (markedImage, error) { return img, nil })
	taken, given := 0, 0
	k.background = func(context.Context, int) (func(), error) {
		taken++
		return func() { given++ }, nil
	}
	for name := range uint64(marksMax) {
		require.NoError(t, k.await(name+1))
	}
	require.ErrorIs(t, k.await(99), trivet.ErrPending)
	k.pin(1, 9)
	k.jobs.Wait()
	assert.Equal(t, []int{3, 3}, []int{taken, given})
	got := k.ask(1, 11, 0)
	assert.Equal(t, markReport{state: markTaken, applied: 11, index: 9, hashed: 200, digest: [32]byte{1}}, got)
	moved := k.moved()
	assert.Equal(t, uint64(200), moved)
	k.ask(1, 11, 50)
	k.ask(1, 11, 40)
	k.ask(1, 11, 60)
	assert.Equal(t, moved+60, k.moved(), "the other side's steps count once")
	k.close()
}

// Only damage is an answer; whatever else goes wrong leaves nothing behind.
func TestMarkFails(t *testing.T) {
	t.Parallel()
	for _, err := range []error{trivet.ErrCorrupt, errors.New("other")} {
		k := newMarks(testVolume, func() (markedImage, error) {
			return &fakeImage{err: err, closed: make(chan struct{})}, nil
		})
		require.NoError(t, k.await(1))
		k.pin(1, 9)
		k.jobs.Wait()
		got := k.ask(1, 0, 0)
		if errors.Is(err, trivet.ErrCorrupt) {
			assert.Equal(t, markDamaged, got.state)
			assert.NotEmpty(t, got.reason)
		} else {
			assert.Equal(t, markUnknown, got.state)
		}
		k.close()
	}
	k := newMarks(testVolume, func() (markedImage, error) { return nil, errors.New("no") })
	require.NoError(t, k.await(1))
	k.pin(1, 9)
	assert.Equal(t, markUnknown, k.ask(1, 0, 0).state)
}

func TestMarkMessages(t *testing.T) {
	t.Parallel()
	a := markAsk{verb: markTell, name: 1, hashed: 2}
	got, err := decodeMarkAsk(a.encode())
	require.NoError(t, err)
	assert.Equal(t, a, got)
	assert.Equal(t, "0202000000000000"+"0000000000000001"+"0000000000000002", hex.EncodeToString(a.encode()))
	rep := markReport{state: markDamaged, applied: 1, index: 2, hashed: 3, digest: [32]byte{4}, reason: "why"}
	back, err := decodeMarkReport(rep.encode())
	require.NoError(t, err)
	assert.Equal(t, rep, back)
	for n := range len(a.encode()) {
		_, err := decodeMarkAsk(a.encode()[:n])
		require.ErrorIs(t, err, trivet.ErrInvalid)
	}
	_, err = decodeMarkAsk(markAsk{verb: markTell}.encode())
	require.ErrorIs(t, err, trivet.ErrInvalid)
	for n := range markReportBytes {
		_, err := decodeMarkReport(rep.encode()[:n])
		require.ErrorIs(t, err, trivet.ErrUnavailable, "what cannot be read is no verdict about a replica")
	}
}

func FuzzDecodeMark(f *testing.F) {
	f.Add(markAsk{verb: markAwait, name: 1}.encode())
	f.Add((&markReport{state: markTaken, digest: [32]byte{1}}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, err := decodeMarkAsk(b); err == nil {
			require.Equal(t, b, a.encode())
		}
		if r, err := decodeMarkReport(b); err == nil {
			require.Equal(t, b, r.encode())
		}
	})
}

func TestJudge(t *testing.T) {
	t.Parallel()
	taken := markReport{state: markTaken, applied: 9, index: 7, digest: [32]byte{1}}
	with := func(f func(*markReport)) markReport {
		r := taken
		f(&r)
		return r
	}
	tests := []struct {
		name         string
		mine, theirs markReport
		done         bool
		err          error
	}{
		{"equal", taken, with(func(r *markReport) { r.applied = 8 }), true, nil},
		{"other digest", taken, with(func(r *markReport) { r.digest[31] = 1 }), true, trivet.ErrCorrupt},
		{"other index", taken, with(func(r *markReport) { r.index = 8 }), true, trivet.ErrCorrupt},
		{"learner works", taken, with(func(r *markReport) { r.state = markTaking }), false, nil},
		{"leader works", with(func(r *markReport) { r.state = markTaking }), taken, false, nil},
		{"learner is not there yet", taken, markReport{state: markAwaited, applied: 6}, false, nil},
		{"learner went by", taken, markReport{state: markAwaited, applied: 7}, true, trivet.ErrUnavailable},
		{"nobody is there yet", markReport{state: markAwaited}, markReport{state: markAwaited, applied: 6}, false, nil},
		{"learner is damaged", taken, markReport{state: markDamaged}, true, trivet.ErrCorrupt},
		{"learner was restarted", taken, markReport{}, true, trivet.ErrUnavailable},
		{"leader is damaged", markReport{state: markDamaged}, taken, true, trivet.ErrUnavailable},
		{"leader gave up", markReport{}, taken, true, trivet.ErrUnavailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			done, err := judge(tt.mine, tt.theirs)
			assert.Equal(t, tt.done, done)
			if tt.err == nil {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, tt.err)
			}
		})
	}
}
