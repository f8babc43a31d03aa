package transport

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// judged is a liveness with its board, and a clock that tests turn.
type judged struct {
	*liveness
	t   *testing.T
	now time.Time
}

func newJudged(t *testing.T) *judged {
	t.Helper()
	l := newLiveness(&board{}, time.Second)
	return &judged{liveness: l, t: t, now: l.epoch}
}

// pass turns the clock, ticking as judge does.
func (j *judged) pass(d time.Duration) {
	for end := j.now.Add(d); j.now.Before(end); {
		j.now = j.now.Add(j.silentAfter / silenceTicks)
		j.tick(j.now, nil)
	}
}

func (j *judged) want(state PresenceState, incarnation uint64) {
	j.t.Helper()
	p := j.board.PresenceOf("n")
	assert.Equal(j.t, state, p.State, p.Reason)
	assert.Equal(j.t, incarnation, p.Incarnation)
	assert.EqualValues(j.t, "n", p.Node)
}

func TestLivenessSilence(t *testing.T) {
	j := newJudged(t)
	j.want(Unknown, 0)
	r, suspect := j.began("n", 5, true)
	require.False(t, suspect)
	j.pass(875 * time.Millisecond)
	j.want(Alive, 5)
	j.pass(250 * time.Millisecond)
	j.want(Gone, 5)
	j.heard(r, 5)
	j.want(Alive, 5)
}

// H29: what others sent while we were stopped has not been read yet.
func TestLivenessOwnPause(t *testing.T) {
	j := newJudged(t)
	_, _ = j.began("n", 5, true)
	j.pass(500 * time.Millisecond)
	j.now = j.now.Add(time.Minute)
	j.tick(j.now, nil)
	j.want(Alive, 5)
	j.pass(875 * time.Millisecond)
	j.want(Alive, 5)
	j.pass(250 * time.Millisecond)
	j.want(Gone, 5)
}

func TestLivenessRefusal(t *testing.T) {
	j := newJudged(t)
	j.refused("n", "there", j.now)
	j.want(Unknown, 0)
	r, _ := j.began("n", 5, true)
	_, _ = j.began("n", 5, false)
	j.refused("n", "there", j.now)
	j.want(Alive, 5)
	j.ended(r, 5, j.now.Add(time.Millisecond))
	j.refused("n", "there", j.now.Add(2*time.Millisecond))
	j.want(Alive, 5) // the other connection is there
	j.ended(r, 5, j.now.Add(3*time.Millisecond))
	j.refused("n", "there", j.now.Add(2*time.Millisecond))
	j.want(Alive, 5) // dialled before the end
	j.refused("n", "there", j.now.Add(4*time.Millisecond))
	j.want(Gone, 5)
}

func TestLivenessIncarnations(t *testing.T) {
	j := newJudged(t)
	r, _ := j.began("n", 5, true)
	_, suspect := j.began("n", 6, false)
	require.True(t, suspect, "what an accepted connection says may be old")
	j.want(Alive, 5)
	var seen []Presence
	defer j.board.Watch(func(p Presence) { seen = append(seen, p) })()
	_, suspect = j.began("n", 6, true)
	require.False(t, suspect)
	j.want(Alive, 6)
	j.board.wg.Wait()
	require.Len(t, seen, 3)
	assert.Equal(t, []PresenceState{Alive, Gone, Alive}, []PresenceState{seen[0].State, seen[1].State, seen[2].State})
	assert.Equal(t, []uint64{5, 5, 6}, []uint64{seen[0].Incarnation, seen[1].Incarnation, seen[2].Incarnation})

	// What is replaced never returns, neither by an old connection nor by a new one to us.
	j.ended(r, 6, j.now)
	j.ended(r, 6, j.now)
	j.refused("n", "there", j.now)
	j.want(Gone, 6)
	j.heard(r, 5)
	_, suspect = j.began("n", 5, false)
	require.False(t, suspect)
	j.want(Gone, 6)
	_, _ = j.began("n", 7, false)
	j.want(Alive, 7)

	// A successor that is connected already takes over when the old one is proved dead.
	_, suspect = j.began("n", 8, false)
	require.True(t, suspect)
	j.ended(r, 7, j.now)
	j.refused("n", "there", j.now)
	j.want(Alive, 8)
}

// A node that moved is dialled at its new address before it is judged.
func TestLivenessMoved(t *testing.T) {
	j := newJudged(t)
	r, _ := j.began("n", 5, true)
	j.dialling("n", "old")
	at := map[trivet.NodeID]string{"n": "old"}
	j.pass(875 * time.Millisecond)
	at["n"] = "new"
	j.now = j.now.Add(250 * time.Millisecond)
	require.Equal(t, []*record{r}, j.tick(j.now, at))
	j.want(Alive, 5)
	j.pass(875 * time.Millisecond)
	j.want(Alive, 5)
	j.now = j.now.Add(250 * time.Millisecond)
	require.Empty(t, j.tick(j.now, at))
	j.want(Gone, 5)
}

func TestLivenessForget(t *testing.T) {
	j := newJudged(t)
	r, _ := j.began("n", 5, true)
	j.forget("n", "removed")
	j.want(Unknown, 0)
	j.heard(r, 5)
	j.want(Unknown, 0)
	_, _ = j.began("n", 5, false)
	j.want(Alive, 5)
}

func TestLivenessProbesAreFew(t *testing.T) {
	j := newJudged(t)
	r, _ := j.began("n", 5, true)
	n, free, ok := j.wantProbe(r, j.now, time.Second)
	require.True(t, ok)
	assert.True(t, free)
	_, _, ok = j.wantProbe(r, j.now, time.Second)
	require.False(t, ok, "one at a time")
	assert.False(t, j.doneProbe(r, n))
	n, free, ok = j.wantProbe(r, j.now, time.Second)
	require.True(t, ok)
	assert.False(t, free, "the backoff holds for the next")
	j.ended(r, 5, j.now)
	assert.True(t, j.doneProbe(r, n), "a reason came up meanwhile")
}

func TestBoardTells(t *testing.T) {
	var b board
	var seen []PresenceState
	block, entered := make(chan struct{}), make(chan struct{})
	var cancel func()
	cancel = b.Watch(func(p Presence) {
		if len(seen) == 0 {
			close(entered)
			<-block
		}
		if seen = append(seen, p.State); len(seen) == 3 {
			cancel()
		}
	})
	b.set("n", Alive, 1, "")
	<-entered
	b.set("n", Alive, 1, "the same: no news")
	b.set("n", Gone, 1, "")
	b.set("n", Alive, 2, "")
	b.set("n", Gone, 2, "after cancel")
	late := 0
	defer b.Watch(func(Presence) { late++ })()
	close(block)
	b.wg.Wait()
	assert.Equal(t, []PresenceState{Alive, Gone, Alive}, seen)
	assert.Equal(t, 1, late, "the present state, and nothing of what was before")
	for i := range uint64(2 * noticesMax) {
		b.mu.Lock()
		b.telling = true // nobody does
		b.mu.Unlock()
		b.set("n", Alive, 10+i, "")
	}
	assert.Len(t, b.notices, noticesMax)
	b.close()
	b.set("n", Gone, 9, "")
	assert.Empty(t, b.notices)
	assert.Equal(t, "unknown alive gone", Unknown.String()+" "+Alive.String()+" "+Gone.String())
}
