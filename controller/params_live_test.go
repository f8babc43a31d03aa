package controller_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

func TestParseQoS(t *testing.T) {
	t.Parallel()
	with := func(change func(*controller.QoS)) controller.QoS {
		q := controller.DefaultQoS()
		change(&q)
		return q
	}
	for _, tc := range []struct {
		key, value string
		want       controller.QoS
		canonical  string
		bad        string // part of the error
	}{
		{"readIopsLimit", "2k", with(func(q *controller.QoS) { q.ReadIOPSLimit = 2000 }), "2000", ""},
		{"WRITEIOPSLIMIT", "5", with(func(q *controller.QoS) { q.WriteIOPSLimit = 5 }), "5", ""},
		{"readBandwidthLimit", "1Gi", with(func(q *controller.QoS) { q.ReadBandwidthLimit = 1 << 30 }), "1073741824", ""},
		{"writeBandwidthLimit", "1M", with(func(q *controller.QoS) { q.WriteBandwidthLimit = 1e6 }), "1000000", ""},
		{"iopsReservation", "300", with(func(q *controller.QoS) { q.IOPSReservation = 300 }), "300", ""},
		{"burst", "60", with(func(q *controller.QoS) { q.Burst = time.Minute }), "60", ""},
		{"burst", "90s", with(func(q *controller.QoS) { q.Burst = 90 * time.Second }), "90", ""},
		{"burst", "0", controller.DefaultQoS(), "", ""},
		{"burst", "3601", controller.QoS{}, "", "at most 3600"},
		{"burst", "1m", controller.QoS{}, "", `"1m"`},
		{"burst", "-1", controller.QoS{}, "", `"-1"`},
		{"priority", "0", with(func(q *controller.QoS) { q.Priority = 0 }), "0", ""},
		{"priority", "100", with(func(q *controller.QoS) { q.Priority = 100 }), "100", ""},
		{"priority", "50", controller.DefaultQoS(), "", ""},
		{"priority", "101", controller.QoS{}, "", "0 to 100"},
		{"priority", "high", controller.QoS{}, "", `"high"`},
		{"ioScheduler", "FAIR", with(func(q *controller.QoS) { q.Scheduler = "fair" }), "fair", ""},
		{"ioScheduler", "deadline", controller.DefaultQoS(), "", ""},
		{"ioScheduler", "cfq", controller.QoS{}, "", "noop, deadline, fair"},
	} {
		t.Run(tc.key+"="+tc.value, func(t *testing.T) {
			t.Parallel()
			got, err := controller.ParseParams(map[string]string{tc.key: tc.value})
			if tc.bad != "" {
				require.ErrorIs(t, err, trivet.ErrInvalid)
				require.ErrorContains(t, err, tc.bad)
				require.ErrorContains(t, err, tc.key)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, tc.want, got.QoS)
			extra := got.Map()
			for k := range controller.DefaultParams().Map() {
				delete(extra, k)
			}
			if tc.canonical == "" {
				assert.Empty(t, extra)
			} else {
				require.Len(t, extra, 1)
				for _, v := range extra {
					assert.Equal(t, tc.canonical, v)
				}
			}
			again, err := controller.ParseParams(got.Map())
			require.NoError(t, err)
			assert.Equal(t, got, again)
		})
	}
	_, err := controller.ParseParams(map[string]string{"iopsReservation": "300", "iopsLimit": "200"})
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "300 is more than")
}

// TestSetParams: all of a patch or nothing, by the same rules as a create, and only what may change.
func TestSetParams(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "v", map[string]string{"iopsLimit": "500", "burst": "10"})
		set := func(patch map[string]string) (meta.Volume, error) { return b.SetParams(soon(t), v.ID, patch) }

		got, err := set(map[string]string{"IOPSLIMIT": "1k", "burst": "", "readBandwidthLimit": "1Mi", "priority": "50"})
		require.NoError(t, err)
		want := controller.DefaultParams().Map()
		want["iopsLimit"], want["readBandwidthLimit"] = "1000", "1048576"
		assert.Equal(t, want, got.Params)
		again, err := set(map[string]string{"iopsLimit": "1000", "readBandwidthLimit": "1024Ki"})
		require.NoError(t, err)
		assert.Equal(t, got, again, "no effect, not even a new revision")

		for _, bad := range []struct {
			patch map[string]string
			says  string
		}{
			{map[string]string{"iopsLimit": "7", "colour": "red"}, `"colour"`},
			{map[string]string{"iopsLimit": "7", "spread": "zone"}, `"spread" cannot be changed, only adaptive, bandwidth`},
			{map[string]string{"iopsLimit": "7", "replicas": "2"}, `"2"`},
			{map[string]string{"iopsLimit": "7", "csi.storage.k8s.io/pvc/name": "x"}, "cannot be changed"},
			{map[string]string{"iopsLimit": "7", "burst": "soon"}, `"soon"`},
			{map[string]string{"iopsLimit": "7", "IopsLimit": "8"}, "are the same"},
			{map[string]string{"iopsReservation": "1001"}, "1001 is more than"},
			{map[string]string{"iopsReservation": "9", "iopsLimit": "8"}, "9 is more than"},
			{nil, "no parameters"},
		} {
			_, err := set(bad.patch)
			require.ErrorIs(t, err, trivet.ErrInvalid, bad.says)
			require.ErrorContains(t, err, bad.says)
		}
		now, err := b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.Equal(t, got, now, "nothing is applied of a bad patch")

		// What contradicts the old limit but not the new one is fine, in one step.
		_, err = set(map[string]string{"iopsReservation": "2000", "iopsLimit": "3000"})
		require.NoError(t, err)
		_, err = set(map[string]string{"iopsReservation": "4000", "iopsLimit": ""})
		require.NoError(t, err)

		_, err = b.SetParams(soon(t), trivet.NewVolumeID(), map[string]string{"burst": "1"})
		require.ErrorIs(t, err, trivet.ErrNotFound)
		assert.Equal(t, v.ID, b.create(t, "v", map[string]string{"iopsLimit": "500", "burst": "10"}).ID,
			"the create, repeated, still finds it")
	})
}

// TestSetParamsAgainstOthers: two that change the volume at once both have their way, and together they
// cannot make what each alone would be refused.
func TestSetParamsAgainstOthers(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "v", map[string]string{"iopsLimit": "1000"})
		b.store.before = func(c meta.Command) bool {
			if c.SetParams != nil && c.SetParams.Params["iopsReservation"] == "900" {
				b.store.before = nil
				_, err := b.SetParams(soon(t), v.ID, map[string]string{"iopsLimit": "800"})
				require.NoError(t, err)
			}
			return true
		}
		_, err := b.SetParams(soon(t), v.ID, map[string]string{"iopsReservation": "900"})
		require.ErrorIs(t, err, trivet.ErrInvalid, "decided anew on the limit of 800")
		require.Nil(t, b.store.before, "the other did come in between")
		got, err := b.SetParams(soon(t), v.ID, map[string]string{"iopsReservation": "700"})
		require.NoError(t, err)
		assert.Equal(t, "800", got.Params["iopsLimit"])
	})
}

// TestSetReplicasAmongParams: the number of replicas is one parameter of several, and all hold from one command on,
// also when an operator has said another number in between.
func TestSetReplicasAmongParams(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 5)
		v := b.create(t, "v", nil)
		var proposed []meta.Command
		b.store.before = func(c meta.Command) bool {
			if c.SetParams != nil {
				proposed = append(proposed, c)
			}
			return true
		}
		got, err := b.SetParams(soon(t), v.ID, map[string]string{
			"Replicas": "5", "priority": "70", "dataLocality": "preferred",
		})
		require.NoError(t, err)
		require.Len(t, proposed, 1)
		assert.Equal(t, 5, got.Want())
		assert.Equal(t, []string{"5", "70", "preferred"}, []string{
			got.Params["replicas"], got.Params["priority"], got.Params["dataLocality"],
		})
		_, err = b.SetReplicas(soon(t), v.ID, 1)
		require.NoError(t, err)
		got, err = b.SetParams(soon(t), v.ID, map[string]string{"priority": "71"})
		require.NoError(t, err)
		assert.Equal(t, 1, got.Want(), "what is not given does not change")
		got, err = b.SetParams(soon(t), v.ID, map[string]string{"replicas": "5"})
		require.NoError(t, err)
		assert.Equal(t, 5, got.Want())

		_, err = b.SetParams(soon(t), v.ID, map[string]string{"replicas": "3", "priority": "101"})
		require.ErrorIs(t, err, trivet.ErrInvalid)
		now, err := b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.Equal(t, 5, now.Want())
		assert.Equal(t, "71", now.Params["priority"])
	})
}
