package main

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller/meta"
)

// The access modes of Kubernetes that a volume can have, in the order in which usage lists them.
var pvModes = []string{modeRWO, modeRWOP, modeROX}

const (
	modeRWO  = "ReadWriteOnce"
	modeRWOP = "ReadWriteOncePod"
	modeROX  = "ReadOnlyMany"

	pvRetain = "Retain"
	pvDelete = "Delete"

	// paramFSType is the StorageClass key that says with which filesystem a volume is formatted.
	paramFSType = "csi.storage.k8s.io/fstype"

	// pvProvisioner is the annotation by which csi-provisioner knows what it may delete.
	pvProvisioner = "pv.kubernetes.io/provisioned-by"
)

// objectName is what names a PersistentVolume (RFC 1123 subdomain); volume names may be anything.
var objectName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// pvOptions is what is asked of a PersistentVolume beside its volume.
type pvOptions struct {
	name, class, claim, reclaim, fsType string
	modes, mountOptions, labels         []string
	block, readOnly                     bool
}

// The parts of a v1.PersistentVolume that are written.
type (
	pvManifest struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   pvMeta `json:"metadata"`
		Spec       pvSpec `json:"spec"`
	}
	pvMeta struct {
		Name        string            `json:"name"`
		Labels      map[string]string `json:"labels,omitempty"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	pvSpec struct {
		Capacity      map[string]string `json:"capacity"`
		AccessModes   []string          `json:"accessModes"`
		ReclaimPolicy string            `json:"persistentVolumeReclaimPolicy"`
		Class         string            `json:"storageClassName"`
		VolumeMode    string            `json:"volumeMode"`
		MountOptions  []string          `json:"mountOptions,omitempty"`
		ClaimRef      *pvClaim          `json:"claimRef,omitempty"`
		CSI           pvSource          `json:"csi"`
	}
	pvClaim struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	}
	pvSource struct {
		Driver   string `json:"driver"`
		Handle   string `json:"volumeHandle"`
		FSType   string `json:"fsType,omitempty"`
		ReadOnly bool   `json:"readOnly,omitempty"`
	}
)

func newVolumePV(o *options) *cobra.Command {
	var p pvOptions
	cmd := &cobra.Command{
		Use:   "pv NAME",
		Short: "Print a Kubernetes PersistentVolume for a volume that is there (static provisioning)",
		Long: "Print the manifest of a PersistentVolume that stands for a volume which was made by hand, or which another\n" +
			"cluster of Kubernetes has left. It has no node affinity: a volume can be used at every node.",
		Example: "  trivet volume pv db | kubectl apply -f -\n" +
			"  trivet volume pv db --claim shop/data-db-0 --label tier=gold",
		Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				v, err := c.GetVolume(ctx, &api.VolumeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				pv, err := persistentVolume(v, p)
				if err != nil {
					return err
				}
				return o.showManifest(cmd, pv)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&p.name, "pv-name", "",
		"name of the PersistentVolume (default: the volume's, or its ID when that is no name)")
	f.StringArrayVar(&p.modes, "access-mode", []string{modeRWO}, strings.Join(pvModes, ", ")+
		"; may be given several times, the first is what nodes go by")
	f.BoolVar(&p.block, "block", false, "give pods the raw block device (volumeMode: Block)")
	f.StringVar(&p.fsType, "fs-type", "", "filesystem: ext4 or xfs (default: the volume's parameter, or ext4)")
	f.StringArrayVar(&p.mountOptions, "mount-option", nil, "mount option; may be given several times")
	f.BoolVar(&p.readOnly, "read-only", false, "attach it read-only always")
	f.StringVar(&p.class, "storage-class", "", "storageClassName, which a claim must have too (default: none)")
	f.StringVar(&p.claim, "claim", "", "NAMESPACE/NAME of the only claim that may bind it (default: any)")
	f.StringVar(&p.reclaim, "reclaim-policy", pvRetain, "Retain, or Delete: the volume goes with its claim")
	f.StringArrayVar(&p.labels, "label", nil,
		"label KEY=VALUE besides the volume's own, for the selector of a claim; may be given several times")
	return cmd
}

// showManifest prints YAML, which is what people read and keep, unless JSON was asked for.
func (o *options) showManifest(cmd *cobra.Command, manifest any) error {
	if o.output == outputJSON {
		return o.show(cmd.OutOrStdout(), manifest, table{})
	}
	b, err := yaml.Marshal(manifest)
	if err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	_, err = cmd.OutOrStdout().Write(b)
	return err
}

// persistentVolume returns the PersistentVolume of v. It returns a usageError for options that Kubernetes, or the
// driver, would refuse later, and an error for a volume that no pod could use.
func persistentVolume(v *api.Volume, p pvOptions) (pvManifest, error) {
	var none pvManifest
	if phase := meta.Phase(v.GetPhase()); phase != meta.PhaseAvailable && phase != meta.PhaseBound {
		return none, fmt.Errorf("volume %q is %s: only one that is %s or %s can be used", v.GetName(), phase,
			meta.PhaseAvailable, meta.PhaseBound)
	}
	if err := p.check(); err != nil {
		return none, err
	}
	own, err := parsePairs("--label", p.labels)
	if err != nil {
		return none, err
	}
	labels := map[string]string{} // the volume's, unless others are given
	maps.Copy(labels, v.GetLabels())
	maps.Copy(labels, own)
	claim, err := p.claimRef()
	if err != nil {
		return none, err
	}
	out := pvManifest{
		APIVersion: "v1", Kind: "PersistentVolume",
		Metadata: pvMeta{Name: p.name, Labels: labels},
		Spec: pvSpec{
			Capacity: map[string]string{"storage": quantity(v.GetSizeBytes())}, AccessModes: p.modes,
			ReclaimPolicy: p.reclaim, Class: p.class, VolumeMode: "Filesystem", MountOptions: p.mountOptions, ClaimRef: claim,
			CSI: pvSource{Driver: trivet.DriverName, Handle: v.GetId(), FSType: p.fsType, ReadOnly: p.readOnly},
		},
	}
	switch {
	case p.name != "":
	case objectName.MatchString(v.GetName()) && len(v.GetName()) < 254:
		out.Metadata.Name = v.GetName()
	default:
		out.Metadata.Name = v.GetId()
	}
	switch {
	case p.block:
		out.Spec.VolumeMode = "Block"
	case p.fsType == "":
		out.Spec.CSI.FSType = v.GetParameters()[paramFSType]
	}
	if p.reclaim == pvDelete {
		out.Metadata.Annotations = map[string]string{pvProvisioner: trivet.DriverName}
	}
	return out, nil
}

// check refuses what does not go together.
func (p *pvOptions) check() error {
	for _, m := range p.modes {
		if !slices.Contains(pvModes, m) {
			return usageError{fmt.Errorf("--access-mode %q: want one of %s", m, strings.Join(pvModes, ", "))}
		}
	}
	switch {
	case len(p.modes) == 0:
		return usageError{fmt.Errorf("--access-mode is missing")}
	case len(p.modes) > 1 && slices.Contains(p.modes, modeRWOP):
		return usageError{fmt.Errorf("--access-mode %s goes with no other", modeRWOP)}
	case p.name != "" && !objectName.MatchString(p.name):
		return usageError{fmt.Errorf("--pv-name %q: want lower case letters, digits, '-' and '.'", p.name)}
	case p.reclaim != pvRetain && p.reclaim != pvDelete:
		return usageError{fmt.Errorf("--reclaim-policy %q: want %s or %s", p.reclaim, pvRetain, pvDelete)}
	case p.fsType != "" && p.fsType != "ext4" && p.fsType != "xfs":
		return usageError{fmt.Errorf("--fs-type %q: want ext4 or xfs", p.fsType)}
	case p.block && (p.fsType != "" || len(p.mountOptions) > 0):
		return usageError{fmt.Errorf("--block goes without --fs-type and --mount-option")}
	}
	return nil
}

func (p *pvOptions) claimRef() (*pvClaim, error) {
	if p.claim == "" {
		return nil, nil //nolint:nilnil // any claim
	}
	namespace, name, ok := strings.Cut(p.claim, "/")
	if !ok || !objectName.MatchString(namespace) || !objectName.MatchString(name) {
		return nil, usageError{fmt.Errorf("--claim %q: want NAMESPACE/NAME", p.claim)}
	}
	return &pvClaim{Namespace: namespace, Name: name}, nil
}

// quantity writes bytes exactly, in the largest binary unit that has no remainder.
func quantity(n int64) string {
	for _, u := range []struct {
		suffix string
		bytes  int64
	}{{"Ti", 1 << 40}, {"Gi", 1 << 30}, {"Mi", 1 << 20}, {"Ki", 1 << 10}} {
		if n > 0 && n%u.bytes == 0 {
			return fmt.Sprintf("%d%s", n/u.bytes, u.suffix)
		}
	}
	return fmt.Sprint(n)
}
