package node

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// ails writes what is wrong with vol on the bench's node, in short; "absent" when it is not there.
func (b *mountBench) ails(t *testing.T) []string {
	t.Helper()
	found, here := b.mounts.health(vol)
	if !here {
		require.Empty(t, found)
		return []string{"absent"}
	}
	var out []string
	for _, c := range found {
		require.NotEmpty(t, c.Message)
		out = append(out, string(c.Status)+" "+c.Reason)
	}
	return out
}

// TestHealthOfAStagedVolume follows a volume through what can befall it on a node.
func TestHealthOfAStagedVolume(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	absent := []string{"absent"}
	require.Equal(t, absent, b.ails(t))
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.Equal(t, absent, b.ails(t), "attached, not staged")
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.Empty(t, b.ails(t))

	b.kernel().die(errors.New("connection aborted"))
	require.Equal(t, []string{"Inaccessible DeviceDead"}, b.ails(t))
	b.kernel().die(nil)
	require.Empty(t, b.ails(t))

	// Another process of this node, or another attachment, has taken it over.
	b.cat.must(meta.Command{TakeOver: &meta.TakeOver{Volume: vol, Node: "n1"}})
	require.Equal(t, []string{"Inaccessible Fenced"}, b.ails(t))
	b.revoke()
	require.Equal(t, []string{"Inaccessible Fenced"}, b.ails(t))
	b.grant("n2", meta.SingleNodeMultiWriter, false)
	require.Equal(t, []string{"Inaccessible Fenced"}, b.ails(t))
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
	require.Equal(t, absent, b.ails(t))
}

// TestHealthBeforeResuming: what the last process left staged is not well before this one serves it.
func TestHealthBeforeResuming(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	b.process(t, testUUID(0x302))
	require.Equal(t, []string{"Inaccessible NotServed"}, b.ails(t))
}

func TestHealthOfTheNode(t *testing.T) {
	t.Parallel()
	now := time.Unix(1e9, 0)
	self := meta.Node{Incarnation: "i", LeaseUntil: now.Add(time.Second)}
	require.Empty(t, leaseHealth(&self, "i", now))
	for name, found := range map[string][]trivet.Condition{
		"run out":         leaseHealth(&self, "i", now.Add(time.Second)),
		"another process": leaseHealth(&self, "j", now),
		"not registered":  leaseHealth(&meta.Node{}, "i", now),
	} {
		require.Len(t, found, 1, name)
		require.Equal(t, "Inaccessible CutOff", string(found[0].Status)+" "+found[0].Reason, name)
	}

	var out []trivet.Condition
	out = diskHealth(out, "/a", 7, nil, nil)
	require.Empty(t, out)
	bad := errors.New("bad")
	out = diskHealth(out, "/b", 0, nil, nil)
	out = diskHealth(out, "/c", 0, bad, nil)
	out = diskHealth(out, "/d", 0, nil, bad)
	out = diskHealth(out, "/e", 0, nil, nil)
	reasons := make([]string, 0, len(out))
	for _, c := range out {
		require.Equal(t, trivet.HealthDegraded, c.Status)
		reasons = append(reasons, c.Reason)
	}
	require.Equal(t, []string{ReasonDiskFull, ReasonDiskDamaged, ReasonDiskFailed}, reasons)
	require.Contains(t, out[0].Message, "/b")
	require.Contains(t, out[0].Message, "/e", "two disks with one trouble are one condition")
}
