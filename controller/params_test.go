package controller_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

func TestParseParams(t *testing.T) {
	t.Parallel()
	def := controller.DefaultParams()
	type params = controller.Params
	with := func(change func(*params)) params {
		p := def
		change(&p)
		return p
	}
	for _, tc := range []struct {
		name string
		in   map[string]string
		want params
		bad  string // part of the error
	}{
		{"none", nil, def, ""},
		{"empty values", map[string]string{"replicas": "", "iopsLimit": ""}, def, ""},
		{"replicas", map[string]string{"REPLICAS": "5"}, with(func(p *params) { p.Replicas = 5 }), ""},
		{
			"reclaim",
			map[string]string{"reclaimpolicy": "Recycle"},
			with(func(p *params) { p.Reclaim = meta.ReclaimRecycle }), "",
		},
		{"iops", map[string]string{"iopsLimit": "1k"}, with(func(p *params) { p.IOPSLimit = 1000 }), ""},
		{"bandwidth", map[string]string{"bandwidthLimit": "10Mi"}, with(func(p *params) { p.BandwidthLimit = 10 << 20 }), ""},
		{"fstype", map[string]string{"csi.storage.k8s.io/fsType": "xfs"}, with(func(p *params) { p.FSType = "xfs" }), ""},
		{"spread", map[string]string{"spread": "zone"}, with(func(p *params) { p.Spread = controller.SpreadZone }), ""},
		{"reads", map[string]string{"readConsistency": "SESSION"}, with(func(p *params) { p.Reads = "session" }), ""},
		{"strong reads", map[string]string{"readConsistency": "strong"}, def, ""},
		{"stale reads", map[string]string{"readConsistency": "stale"}, def, `"stale"`},
		{"cache mode", map[string]string{"cacheMode": "writeback"}, with(func(p *params) { p.CacheMode = "writeBack" }), ""},
		{"default cache mode", map[string]string{"cacheMode": "writeThrough", "eviction": "LRU"}, def, ""},
		{"cache size", map[string]string{"cacheSize": "1Mi"}, with(func(p *params) { p.CacheSize = 1 << 20 }), ""},
		{"no cache", map[string]string{"cacheSize": "0"}, with(func(p *params) { p.CacheSize = 0 }), ""},
		{"read ahead", map[string]string{"readAhead": "0"}, with(func(p *params) { p.ReadAhead = 0 }), ""},
		{"eviction", map[string]string{"eviction": "lfu"}, with(func(p *params) { p.Eviction = "lfu" }), ""},
		{"adaptive", map[string]string{"Adaptive": "ON"}, with(func(p *params) { p.Adaptive = true }), ""},
		{"not adaptive", map[string]string{"adaptive": "off"}, def, ""},
		{"half adaptive", map[string]string{"adaptive": "maybe"}, def, `"maybe"`},
		{"wipe", map[string]string{"reclaimWipe": "Zero"}, with(func(p *params) { p.Wipe = "zero" }), ""},
		{"no wipe", map[string]string{"reclaimWipe": "none"}, def, ""},
		{"locality", map[string]string{"DataLocality": "PREFERRED"}, with(func(p *params) { p.Locality = "preferred" }), ""},
		{"no locality", map[string]string{"dataLocality": "none"}, def, ""},
		{"strict locality", map[string]string{"dataLocality": "required"}, def, `"required"`},
		{"shred", map[string]string{"reclaimWipe": "shred"}, def, `"shred"`},
		{"bad mode", map[string]string{"cacheMode": "writeNever"}, def, `"writeNever"`},
		{"bad eviction", map[string]string{"eviction": "mru"}, def, `"mru"`},
		{"small cache", map[string]string{"cacheSize": "4Ki"}, def, `"4Ki"`},
		{"long read ahead", map[string]string{"readAhead": "2Mi"}, def, `"2Mi"`},
		{"metadata", map[string]string{
			"csi.storage.k8s.io/pvc/name": "x", "csi.storage.k8s.io/pvc/namespace": "y",
			"csi.storage.k8s.io/pv/name": "z",
		}, def, ""},
		{"unknown", map[string]string{"colour": "red"}, def, `"colour"`},
		{"unknown metadata", map[string]string{"csi.storage.k8s.io/else": "x"}, def, `"csi.storage.k8s.io/else"`},
		{"twice", map[string]string{"replicas": "3", "Replicas": "1"}, def, `"Replicas" and "replicas"`},
		{"even", map[string]string{"replicas": "2"}, def, `"replicas": value "2"`},
		{"policy", map[string]string{"reclaimPolicy": "burn"}, def, `"burn"`},
		{"fs", map[string]string{"csi.storage.k8s.io/fstype": "ntfs"}, def, `"ntfs"`},
		{"negative", map[string]string{"iopsLimit": "-5"}, def, `"-5"`},
		{"plus", map[string]string{"iopsLimit": "+5"}, def, `"+5"`},
		{"fraction", map[string]string{"bandwidthLimit": "1.5Mi"}, def, `"1.5Mi"`},
		{"unit only", map[string]string{"bandwidthLimit": "Mi"}, def, `"Mi"`},
		{"overflow", map[string]string{"bandwidthLimit": "9000000Ti"}, def, "whole number"},
		{"bytes", map[string]string{"bandwidthLimit": "1MB"}, def, "whole number"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			got, err := controller.ParseParams(tc.in)
			if tc.bad != "" {
				require.ErrorIs(t, err, trivet.ErrInvalid)
				require.ErrorContains(t, err, tc.bad)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, tc.want, got)
			again, err := controller.ParseParams(got.Map())
			require.NoError(t, err)
			assert.Equal(t, got, again, "the canonical form reads back")
			assert.Equal(t, got.Fingerprint(), again.Fingerprint())
			assert.Equal(t, got == def, got.Fingerprint() == def.Fingerprint())
		})
	}
}

func FuzzParams(f *testing.F) {
	f.Add("replicas", "3")
	f.Add("bandwidthLimit", "10Mi")
	f.Add("reclaimPolicy", "retain")
	f.Fuzz(func(t *testing.T, key, value string) {
		p, err := controller.ParseParams(map[string]string{key: value})
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrInvalid)
			return
		}
		require.GreaterOrEqual(t, p.IOPSLimit, int64(0))
		require.GreaterOrEqual(t, p.BandwidthLimit, int64(0))
		again, err := controller.ParseParams(p.Map())
		require.NoError(t, err)
		require.Equal(t, p, again)
		_, err = controller.ParseParams(map[string]string{strings.ToUpper(key): value})
		require.NoError(t, err)
	})
}
