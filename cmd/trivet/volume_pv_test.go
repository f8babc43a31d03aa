package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/yaml"

	"github.com/trivet-csi/trivet/api"
)

func pvVolume() *api.Volume {
	return &api.Volume{Id: "vol-0123456789abcdef", Name: "db", SizeBytes: 10 << 30, Phase: "Available"}
}

func pvDefaults() pvOptions { return pvOptions{modes: []string{modeRWO}, reclaim: pvRetain} }

// TestPersistentVolume: Kubernetes reads every manifest, strictly, as what was meant.
func TestPersistentVolume(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		volume func(*api.Volume)
		option func(*pvOptions)
		want   func(*corev1.PersistentVolume)
	}{
		"plain": {},
		"an odd size": {
			volume: func(v *api.Volume) { v.SizeBytes = 10<<30 + 4096 },
			want: func(pv *corev1.PersistentVolume) {
				pv.Spec.Capacity[corev1.ResourceStorage] = *resource.NewQuantity(10<<30+4096, resource.BinarySI)
			},
		},
		"a name that is no object name": {
			volume: func(v *api.Volume) { v.Name = "Datenbank Nr. 1" },
			want:   func(pv *corev1.PersistentVolume) { pv.Name = "vol-0123456789abcdef" },
		},
		"its filesystem": {
			volume: func(v *api.Volume) { v.Parameters = map[string]string{paramFSType: "xfs"} },
			want:   func(pv *corev1.PersistentVolume) { pv.Spec.CSI.FSType = "xfs" },
		},
		"its labels": {
			volume: func(v *api.Volume) { v.Labels = map[string]string{"tier": "gold", "team": "shop"} },
			option: func(p *pvOptions) { p.labels = []string{"tier=silver", "a=b"} },
			want: func(pv *corev1.PersistentVolume) {
				pv.Labels = map[string]string{"tier": "silver", "team": "shop", "a": "b"}
			},
		},
		"block": {
			volume: func(v *api.Volume) { v.Parameters = map[string]string{paramFSType: "xfs"} },
			option: func(p *pvOptions) { p.block = true },
			want: func(pv *corev1.PersistentVolume) {
				block := corev1.PersistentVolumeBlock
				pv.Spec.VolumeMode = &block
			},
		},
		"all that can be said": {
			option: func(p *pvOptions) {
				*p = pvOptions{
					name: "pv-db", class: "trivet", claim: "shop/data-db-0", reclaim: pvDelete, fsType: "xfs",
					modes: []string{modeROX, modeRWO}, mountOptions: []string{"noatime"}, labels: []string{"tier=gold", "a=b"},
					readOnly: true,
				}
			},
			want: func(pv *corev1.PersistentVolume) {
				pv.Name, pv.Labels = "pv-db", map[string]string{"tier": "gold", "a": "b"}
				pv.Annotations = map[string]string{pvProvisioner: "csi.trivet.dev"}
				pv.Spec.StorageClassName, pv.Spec.MountOptions = "trivet", []string{"noatime"}
				pv.Spec.ClaimRef = &corev1.ObjectReference{Namespace: "shop", Name: "data-db-0"}
				pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimDelete
				pv.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadOnlyMany, corev1.ReadWriteOnce}
				pv.Spec.CSI.FSType, pv.Spec.CSI.ReadOnly = "xfs", true
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v, p, filesystem := pvVolume(), pvDefaults(), corev1.PersistentVolumeFilesystem
			want := corev1.PersistentVolume{Spec: corev1.PersistentVolumeSpec{
				Capacity:                      corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("10Gi")},
				AccessModes:                   []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
				PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
				VolumeMode:                    &filesystem,
				PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
					Driver: "csi.trivet.dev", VolumeHandle: "vol-0123456789abcdef",
				}},
			}}
			want.APIVersion, want.Kind, want.Name = "v1", "PersistentVolume", "db"
			if tc.volume != nil {
				tc.volume(v)
			}
			if tc.option != nil {
				tc.option(&p)
			}
			if tc.want != nil {
				tc.want(&want)
			}
			pv, err := persistentVolume(v, p)
			require.NoError(t, err)
			b, err := yaml.Marshal(pv)
			require.NoError(t, err)
			var got corev1.PersistentVolume
			require.NoError(t, yaml.UnmarshalStrict(b, &got))
			size, wanted := got.Spec.Capacity[corev1.ResourceStorage], want.Spec.Capacity[corev1.ResourceStorage]
			assert.Zero(t, size.Cmp(wanted), "%s, want %s", &size, &wanted)
			got.Spec.Capacity, want.Spec.Capacity = nil, nil
			assert.Equal(t, want, got)
		})
	}
}

func TestPersistentVolumeRefused(t *testing.T) {
	t.Parallel()
	for says, change := range map[string]func(*pvOptions){
		"ReadWriteMany":  func(p *pvOptions) { p.modes = []string{"ReadWriteMany"} },
		"is missing":     func(p *pvOptions) { p.modes = nil },
		"no other":       func(p *pvOptions) { p.modes = []string{modeRWOP, modeRWO} },
		"--pv-name":      func(p *pvOptions) { p.name = "No_Name" },
		"Recycle":        func(p *pvOptions) { p.reclaim = "Recycle" },
		"ntfs":           func(p *pvOptions) { p.fsType = "ntfs" },
		"--block":        func(p *pvOptions) { p.block, p.mountOptions = true, []string{"noatime"} },
		"NAMESPACE/NAME": func(p *pvOptions) { p.claim = "data-db-0" },
		"want KEY=VALUE": func(p *pvOptions) { p.labels = []string{"gold"} },
		"is given twice": func(p *pvOptions) { p.labels = []string{"a=1", "a=2"} },
	} {
		p := pvDefaults()
		change(&p)
		_, err := persistentVolume(pvVolume(), p)
		require.ErrorAs(t, err, new(usageError), says)
		require.ErrorContains(t, err, says)
	}
	v := pvVolume()
	v.Phase = "Released"
	_, err := persistentVolume(v, pvDefaults())
	require.ErrorContains(t, err, "Released")
}
