package main

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet/api"
)

func replicasIn(states ...string) []*api.Replica {
	out := make([]*api.Replica, 0, len(states))
	for i, s := range states {
		out = append(out, &api.Replica{Id: string(rune('a' + i)), Node: "n" + string(rune('1'+i)), State: s})
	}
	return out
}

func TestReplicasLeft(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		states []string
		want   int32
		left   string
	}{
		{"as wanted", []string{"Ready", "Ready", "Ready"}, 3, ""},
		{"parked is ready", []string{"Ready", "Parked", "Parked"}, 3, ""},
		{"one fills", []string{"Ready", "Filling"}, 3, "1 of 2 replicas are ready, want 3: why"},
		{"one leaves", []string{"Ready", "Ready", "Ready", "Leaving"}, 3, "3 of 4 replicas are ready, want 3: why"},
		{"too many", []string{"Ready", "Ready"}, 1, "2 of 2 replicas are ready, want 1: why"},
		{"one faulted", []string{"Ready", "Ready", "Faulted"}, 3, "2 of 3 replicas are ready, want 3: why"},
	} {
		got := replicasLeft(&api.Volume{Replicas: replicasIn(tc.states...), WantReplicas: tc.want, Pending: "why"})
		assert.Equal(t, tc.left, got, tc.name)
	}
}

func TestMoveLeft(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		states []string
		left   string
		fails  bool
	}{
		{"is filled", []string{"Ready", "Filling"}, "the replica on n2 is Filling", false},
		{"the old one leaves", []string{"Leaving", "Ready"}, "the replica on n1 is Leaving", false},
		{"done", []string{"Ready", "Ready"}, "", false},
		{"leaves itself", []string{"Ready", "Leaving"}, "", true},
		{"is gone", []string{"Ready"}, "", true},
	} {
		left, err := moveLeft(&api.Volume{Replicas: replicasIn(tc.states...)}, "b")
		assert.Equal(t, tc.left, left, tc.name)
		assert.Equal(t, tc.fails, err != nil, tc.name)
	}
}

func TestDrainShowsWhatIsLeft(t *testing.T) {
	t.Parallel()
	st := &api.NodeStatus{Node: &api.Node{Id: "n1", State: "Up", Cordoned: true, Draining: true}}
	left, err := drainLeft(st)
	require.NoError(t, err)
	assert.Empty(t, left)
	st.Remaining = []*api.Remaining{
		{Name: "db", Replica: "r", State: "Ready", Leader: true, Reason: "no room"}, {Name: "web", Attached: true},
	}
	left, err = drainLeft(st)
	require.NoError(t, err)
	assert.Equal(t, "replicas left: 1", left, "what is only attached is not waited for")

	var out bytes.Buffer
	cmd := &cobra.Command{}
	cmd.SetOut(&out)
	o := &options{output: outputTable}
	require.NoError(t, o.showDrain(cmd, st))
	for _, word := range []string{"Up,draining", "db", "no room", "web"} {
		assert.Contains(t, out.String(), word)
	}
	out.Reset()
	o.output = outputJSON
	require.NoError(t, o.showDrain(cmd, &api.NodeStatus{Node: &api.Node{Id: "n1"}}))
	assert.Contains(t, out.String(), `"remaining": []`)
	assert.Contains(t, out.String(), `"draining": false`)

	st.Node.Draining = false
	_, err = drainLeft(st)
	require.ErrorContains(t, err, "uncordoned")
	assert.Equal(t, "Up,cordoned", nodeOf(st.GetNode()).stateText())
}

func TestVolumeViewShowsChanges(t *testing.T) {
	t.Parallel()
	v := &api.Volume{
		Name: "v", WantReplicas: 3, Pending: "the replica on n4 is being filled", Replicas: replicasIn("Ready", "Filling"),
		Retired: []*api.Replica{{Id: "z", Node: "n9", State: "Left"}},
	}
	var out bytes.Buffer
	cmd := &cobra.Command{}
	cmd.SetOut(&out)
	require.NoError(t, (&options{output: outputTable}).showVolume(cmd, v))
	for _, word := range []string{"replicas wanted: 3", "being filled", "Filling", "n9", "Left"} {
		assert.Contains(t, out.String(), word)
	}
	out.Reset()
	require.NoError(t, (&options{output: outputJSON}).showVolume(cmd, v))
	assert.Contains(t, out.String(), `"wantReplicas": 3`)
	assert.Contains(t, out.String(), `"retired": [`)
}

// TestAwait: it goes on while something is left or nobody answers, and says at the end what was left.
func TestAwait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		answers := []error{nil, status.Error(codes.Unavailable, "no leader"), status.Error(codes.Aborted, "busy"), nil, nil}
		n := 0
		require.NoError(t, await(ctx, "x", func(context.Context) (string, error) {
			n++
			if n == len(answers) {
				return "", nil
			}
			return "two", answers[n-1]
		}))
		assert.Equal(t, len(answers), n)

		err := await(ctx, "drain n1", func(context.Context) (string, error) { return "", errors.New("no such node") })
		require.EqualError(t, err, "no such node")
		begin := time.Now()
		err = await(ctx, "drain n1", func(context.Context) (string, error) {
			if time.Since(begin) > 30*time.Second {
				return "", status.Error(codes.Unavailable, "no leader")
			}
			return "2 replicas are left", nil
		})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "drain n1")
		require.ErrorContains(t, err, "2 replicas are left")
	})
}
