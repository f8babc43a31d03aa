package controller_test

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// said keeps what a catalogue logs.
type said struct {
	slog.Handler
	mu    *sync.Mutex
	lines *[]string
}

func newSaid() said {
	return said{slog.DiscardHandler, &sync.Mutex{}, &[]string{}}
}

func (s said) Enabled(context.Context, slog.Level) bool { return true }
func (s said) WithAttrs([]slog.Attr) slog.Handler       { return s }
func (s said) Handle(_ context.Context, r slog.Record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	*s.lines = append(*s.lines, r.Message)
	return nil
}

// has counts the lines with a text.
func (s said) has(text string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range *s.lines {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}

// rot changes a byte of every copy of a text in the log of a node, which does not write at the moment.
func (g *group) rot(t *testing.T, id trivet.NodeID, text string) {
	t.Helper()
	hits := 0
	g.eachSegment(t, id, func(b []byte) {
		for at := bytes.Index(b, []byte(text)); at >= 0; at = bytes.Index(b, []byte(text)) {
			b[at] ^= 1
			hits++
		}
	})
	require.Positive(t, hits, "%q is not in the log of %s", text, id)
}

func (g *group) eachSegment(t *testing.T, id trivet.NodeID, do func(b []byte)) {
	t.Helper()
	names, err := g.disks[id].List("data/meta/log")
	require.NoError(t, err)
	for _, name := range names {
		b, err := g.disks[id].UnsafeGetFileDataBuffer("data/meta/log/" + name)
		require.NoError(t, err)
		do(b)
	}
}

func (g *group) restart(t *testing.T, id trivet.NodeID) *controller.Catalogue {
	t.Helper()
	c := g.boot(t, id)
	require.NoError(t, c.Open(t.Context()))
	return c
}

// mustSet makes a change that stands in one log entry, with a text that is nowhere else.
func (g *group) mustSet(t *testing.T, at trivet.NodeID, text string) {
	t.Helper()
	_, err := g.cats[at].Propose(minute(t), createCommand(text, 1))
	require.NoError(t, err)
}

// allSee waits until each node's own copy has volumes of these names.
func (g *group) allSee(t *testing.T, names ...string) {
	t.Helper()
	eventually(t, "all have "+strings.Join(names, ", "), func() bool {
		for _, c := range g.cats {
			for _, name := range names {
				if _, ok := c.Local().VolumeByName(name); !ok {
					return false
				}
			}
		}
		return true
	})
}

// H23: each of the three members has an entry that it cannot read, each another one, and the last was acknowledged a
// moment before all of them stopped. They mend each other, nothing is lost, and no process ends.
func TestCatalogueMendsItsLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := cluster(t)
		names := []string{"alpha", "beta", "gamma"}
		for _, name := range names {
			g.mustSet(t, "n1", name)
		}
		g.allSee(t, names...)
		for i := range names {
			g.kill(t, nodeID(i+1))
		}
		logs := newSaid()
		g.logger = slog.New(logs)
		for i, name := range names {
			g.rot(t, nodeID(i+1), name)
			c := g.restart(t, nodeID(i+1))
			if i == 0 { // the others may have been mended already
				assert.Positive(t, c.Damaged())
				assert.Contains(t, c.Damage(), "trivet cluster recover --catalogue")
			}
		}
		g.allSee(t, names...)
		require.Equal(t, 3, logs.has("entries of the log are damaged"), "all had one")
		g.leader(t)
		g.mustSet(t, "n2", "delta")
		g.allSee(t, "delta")
		for _, c := range g.cats {
			assert.Zero(t, c.Damaged())
			assert.Empty(t, c.Damage())
		}
	})
}

// What one member with a hole has acknowledged beside one that is down must not be lost to the third, which never had
// it: nobody leads until the other is back.
func TestCatalogueWithHoleDoesNotVote(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := cluster(t)
		g.kill(t, "n3")
		g.mustSet(t, "n1", "alpha")
		g.allSee(t, "alpha")
		g.kill(t, "n1")
		g.kill(t, "n2")
		g.rot(t, "n2", "alpha")
		n2, n3 := g.restart(t, "n2"), g.restart(t, "n3")
		<-time.After(30 * time.Second)
		require.Empty(t, n2.Leader())
		require.Empty(t, n3.Leader())
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := n2.Read(ctx)
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.ErrorContains(t, err, "entries of the catalogue's log on n2 are damaged")
		g.restart(t, "n1")
		g.allSee(t, "alpha")
	})
}

// A leader meets damage in an entry that it has applied, because a member that was away needs it. It is opened again,
// alone, and so is whoever leads next and has the same; both go on, and the one that was away gets what they have.
func TestCatalogueMeetsRotWhileItRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := cluster(t)
		g.kill(t, "n3")
		g.mustSet(t, "n1", "alpha")
		g.allSee(t, "alpha")
		for _, id := range []trivet.NodeID{"n1", "n2"} { // nothing of their logs is in memory then
			g.kill(t, id)
		}
		logs := newSaid()
		g.logger = slog.New(logs)
		for _, id := range []trivet.NodeID{"n1", "n2"} {
			g.restart(t, id)
		}
		g.allSee(t, "alpha")
		g.leader(t)
		synctest.Wait()
		g.rot(t, "n1", "alpha")
		g.rot(t, "n2", "alpha")
		g.restart(t, "n3")
		g.allSee(t, "alpha")
		require.Positive(t, logs.has("an entry of the log is damaged: the replica is suspect"))
		require.Positive(t, logs.has("the catalogue was opened again"))
		g.leader(t)
		g.mustSet(t, "n3", "beta")
		g.allSee(t, "alpha", "beta")
	})
}

// An only member has nobody to ask. It waits, says what to do, and goes on without the damaged entry when told to.
func TestCatalogueAloneWithHole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup(t)
		require.NoError(t, g.boot(t, "n1").Bootstrap(minute(t)))
		register(t, g.cats["n1"], 1)
		for _, name := range []string{"alpha", "beta", "gamma"} {
			g.mustSet(t, "n1", name)
		}
		g.kill(t, "n1")
		g.rot(t, "n1", "beta")
		c := g.restart(t, "n1")
		<-time.After(time.Minute)
		require.Contains(t, c.Damage(), "of which there is none")
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := c.Propose(ctx, cordon("n1"))
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.ErrorContains(t, err, "trivet cluster recover --catalogue")

		plan, err := c.Recover(minute(t), false)
		require.NoError(t, err)
		require.GreaterOrEqual(t, plan.Dropped, uint64(2), "beta and gamma")
		require.Contains(t, plan.Warning(), "entries of its log are given up")
		require.Equal(t, 1, c.Damaged(), "nothing was done")
		_, err = c.Recover(minute(t), true)
		require.NoError(t, err)
		require.Zero(t, c.Damaged())
		s, err := c.Read(minute(t))
		require.NoError(t, err)
		_, alpha := s.VolumeByName("alpha")
		_, beta := s.VolumeByName("beta")
		require.True(t, alpha)
		require.False(t, beta)
		last := s.Audit().Records[len(s.Audit().Records)-1]
		require.Equal(t, meta.AuditRecover, last.Kind)
		require.Contains(t, last.Detail, "damaged and later ones dropped")
		g.kill(t, "n1")
		c = g.restart(t, "n1")
		eventually(t, "it leads", func() bool { return c.Leader() == "n1" })
	})
}

// An entry that no member can read. The members live, but none votes: an operator may go on, on the one whose log is
// whole the furthest, and the others stay.
func TestCatalogueRecoverFromHoles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := cluster(t)
		for _, name := range []string{"alpha", "beta", "gamma"} {
			g.mustSet(t, "n1", name)
		}
		g.allSee(t, "alpha", "beta", "gamma")
		for _, id := range []trivet.NodeID{"n1", "n2", "n3"} {
			g.kill(t, id)
			g.rot(t, id, "gamma")
		}
		g.rot(t, "n3", "beta")
		for _, id := range []trivet.NodeID{"n1", "n2", "n3"} {
			g.restart(t, id)
		}
		eventually(t, "n3 has beta", func() bool { return g.cats["n3"].Damaged() == 1 })
		<-time.After(time.Minute)
		for id, c := range g.cats {
			require.Empty(t, c.Leader(), id)
		}
		done, err := g.cats["n2"].Recover(minute(t), true)
		require.NoError(t, err)
		require.Empty(t, done.Lost)
		require.Len(t, done.Kept, 2)
		require.Len(t, done.Damaged, 3)
		g.allSee(t, "alpha", "beta")
		for i := range 3 {
			register(t, g.cats[nodeID(i+1)], i+1) // their leases have run out
		}
		g.awaitVoters(t, 3)
		g.mustSet(t, "n1", "delta")
		g.allSee(t, "delta")
		for id, c := range g.cats {
			_, ok := c.Local().VolumeByName("gamma")
			require.False(t, ok, id)
			require.Zero(t, c.Damaged(), id)
		}
	})
}

// A member of which not even term and vote can be read never runs again. Its directory is set aside, and the node
// joins anew as another member, which votes in its place.
func TestCatalogueIsSetAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := cluster(t)
		g.mustSet(t, "n1", "alpha")
		g.allSee(t, "alpha")
		n3 := g.cats["n3"]
		old := n3.Replica()
		require.ErrorIs(t, n3.SetAside(), trivet.ErrInUse)
		g.kill(t, "n3")
		g.snapshotBytes = 16 << 10 // so that it has a state file as well
		n3 = g.restart(t, "n3")
		g.snapshotBytes = 0
		eventually(t, "the state is written", func() bool {
			g.mustSet(t, "n1", fmt.Sprint("v", len(n3.Local().Volumes())))
			_, err := g.disks["n3"].Stat("data/meta/catalogue")
			return err == nil
		})
		g.kill(t, "n3")
		g.eachSegment(t, "n3", func(b []byte) { clear(b[:4096]) }) // headers, which name the checkpoints
		c := g.boot(t, "n3")
		require.ErrorIs(t, c.Open(t.Context()), trivet.ErrCorrupt)
		require.False(t, c.Opened())
		require.NoError(t, c.SetAside())
		_, err := g.disks["n3"].Stat("data/meta.damaged/log")
		require.NoError(t, err, "it is kept")
		_, err = g.disks["n3"].Stat("data/meta")
		require.ErrorIs(t, err, fs.ErrNotExist)
		replica, err := c.Prepare(t.Context())
		require.NoError(t, err)
		require.NotEqual(t, old, replica)
		require.NoError(t, c.Open(t.Context()))
		require.NoError(t, g.cats["n1"].AddMember(minute(t), "n3", replica))
		register(t, c, 3)
		g.awaitVoters(t, 3)
		g.allSee(t, "alpha")
	})
}
