package failover

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/trivet-csi/trivet"
)

const (
	// fencesMax bounds how many volumes are fenced at a time.
	fencesMax = 16

	// fenceTimeout bounds one fence: an election in the volume's group, a commit and the wait for one lease of its
	// leader fit in several times. What takes longer is tried again in the next round.
	fenceTimeout = 15 * time.Second
)

// volume is an attachment of one of our volumes to the dead node.
type volume struct {
	attachment storagev1.VolumeAttachment
	handle     string               // volume ID
	claim      types.NamespacedName // empty when it has none

	keep   string // why it is left alone; empty: it is not
	fenced bool
	inUse  bool // by a pod that could not be removed
}

// work is what is to be done for a dead node.
type work struct {
	volumes []*volume
	pods    []pod
}

// pod is a pod on the dead node with the volumes of ours that it uses.
type pod struct {
	corev1.Pod

	volumes []*volume
}

// failOver fences what the node holds and then removes what stands in the way of its pods elsewhere.
func (c *Controller) failOver(ctx context.Context, dead corpse) error {
	w, err := c.plan(ctx, string(dead.id))
	if err != nil {
		return fmt.Errorf("node %s: what it holds: %w", dead.id, err)
	}
	if len(w.volumes) == 0 {
		c.rest(dead.id)
		return nil
	}
	c.log.Warn("failover: a node is dead, its volumes are fenced", "node", string(dead.id), "reason", dead.reason,
		"volumes", len(w.volumes), "pods", len(w.pods))
	errs := []error{c.fence(ctx, dead.id, w.volumes)}
	if !slices.ContainsFunc(w.volumes, func(v *volume) bool { return v.fenced }) {
		return errors.Join(errs...)
	}
	if err := c.release(ctx, dead.node, w.volumes); err != nil {
		return errors.Join(append(errs, fmt.Errorf("node %s: %w", dead.id, err))...)
	}
	errs = append(errs, c.removePods(ctx, w.pods), c.removeAttachments(ctx, w.volumes))
	return errors.Join(errs...)
}

// plan finds out what is to be moved from a node. Volumes that are left alone are not in it.
func (c *Controller) plan(ctx context.Context, node string) (*work, error) {
	volumes, err := c.volumesOn(ctx, node)
	if err != nil || len(volumes) == 0 {
		return &work{}, err
	}
	all, err := c.cfg.API.PodsOn(ctx, node)
	if err != nil {
		return nil, err
	}
	w := &work{}
	for _, p := range all {
		if used := usedBy(&p, volumes); len(used) > 0 {
			w.pods = append(w.pods, pod{Pod: p, volumes: used})
		}
	}
	w.leaveAlone(volumes)
	for _, v := range volumes {
		if v.keep == "" {
			w.volumes = append(w.volumes, v)
		} else {
			c.log.Debug("failover: volume is left alone", "node", node, "volume", v.handle, "reason", v.keep)
		}
	}
	return w, nil
}

// leaveAlone marks the volumes that may not be taken from the pods that stay, and drops those pods. A pod that
// cannot be moved because of one volume keeps all that it has, and so on.
func (w *work) leaveAlone(volumes []*volume) {
	for range volumes { // each pass but the last marks one more
		for i := range w.pods {
			p := &w.pods[i]
			why := stays(&p.Pod)
			for _, v := range p.volumes {
				if why == "" && v.keep != "" {
					why = fmt.Sprintf("pod %s/%s uses volume %s too", p.Namespace, p.Name, v.handle)
				}
			}
			for _, v := range p.volumes {
				if v.keep == "" {
					v.keep = why
				}
			}
		}
	}
	w.pods = slices.DeleteFunc(w.pods, func(p pod) bool { return p.volumes[0].keep != "" })
}

// stays says why a pod is not removed from its node, or "".
func stays(p *corev1.Pod) string {
	owner := metav1.GetControllerOf(p)
	switch {
	case p.DeletionTimestamp != nil:
		return ""
	case owner == nil:
		return fmt.Sprintf("pod %s/%s has no controller that would make it again", p.Namespace, p.Name)
	case owner.Kind == "DaemonSet" || owner.Kind == "Node":
		return fmt.Sprintf("pod %s/%s belongs to the node", p.Namespace, p.Name)
	}
	return ""
}

// volumesOn returns the volumes of ours that are attached to a node.
func (c *Controller) volumesOn(ctx context.Context, node string) ([]*volume, error) {
	attachments, err := c.cfg.API.VolumeAttachments(ctx)
	if err != nil {
		return nil, err
	}
	var out []*volume
	optedOut := map[string]bool{}
	for _, a := range attachments {
		name := a.Spec.Source.PersistentVolumeName
		if a.Spec.Attacher != trivet.DriverName || a.Spec.NodeName != node || name == nil {
			continue
		}
		pv, err := c.cfg.API.PersistentVolume(ctx, *name)
		if errors.Is(err, trivet.ErrNotFound) {
			continue // the attacher's to clear up
		}
		if err != nil {
			return nil, err
		}
		if pv.Spec.CSI == nil || pv.Spec.CSI.Driver != trivet.DriverName {
			continue
		}
		v := &volume{attachment: a, handle: pv.Spec.CSI.VolumeHandle}
		if ref := pv.Spec.ClaimRef; ref != nil {
			v.claim = types.NamespacedName{Namespace: ref.Namespace, Name: ref.Name}
			if v.keep, err = c.optOut(ctx, ref.Namespace, optedOut); err != nil {
				return nil, err
			}
		}
		out = append(out, v)
	}
	return out, nil
}

// optOut says that a namespace does not want its pods moved, or "". A value that is not known counts as that: by a
// typing error nothing moves that was not to.
func (c *Controller) optOut(ctx context.Context, namespace string, known map[string]bool) (string, error) {
	out, ok := known[namespace]
	if !ok {
		annotations, err := c.cfg.API.NamespaceAnnotations(ctx, namespace)
		if err != nil && !errors.Is(err, trivet.ErrNotFound) {
			return "", err
		}
		value, set := annotations[OptOut]
		out = set && value != OptIn
		known[namespace] = out
	}
	if out {
		return "namespace " + namespace + " opts out", nil
	}
	return "", nil
}

// usedBy returns which of the volumes a pod uses: none when it has ended.
func usedBy(p *corev1.Pod, volumes []*volume) []*volume {
	if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return nil
	}
	var used []*volume
	for i := range p.Spec.Volumes {
		claim := types.NamespacedName{Namespace: p.Namespace}
		switch source := &p.Spec.Volumes[i]; {
		case source.PersistentVolumeClaim != nil:
			claim.Name = source.PersistentVolumeClaim.ClaimName
		case source.Ephemeral != nil: // k8s.io/component-helpers/storage/ephemeral, VolumeClaimName
			claim.Name = p.Name + "-" + source.Name
		default:
			continue
		}
		for _, v := range volumes {
			if v.claim == claim {
				used = append(used, v)
			}
		}
	}
	return used
}

// fence fences the volumes, some at a time, and marks those that are.
func (c *Controller) fence(ctx context.Context, node trivet.NodeID, volumes []*volume) error {
	errs := make([]error, len(volumes))
	slots := make(chan struct{}, fencesMax)
	var wg sync.WaitGroup
	for i, v := range volumes {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, fenceTimeout)
			defer cancel()
			if err := c.cfg.Catalogue.Fence(ctx, v.handle, node); err != nil {
				errs[i] = fmt.Errorf("fence %s from %s: %w", v.handle, node, err)
				return
			}
			v.fenced = true
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// release tells Kubernetes what the fences make true of a node: that it is no place for new pods, and that the
// fenced volumes are not in use there. Without the second the attach/detach controller waits for the kubelet to say
// so, for up to six minutes (pkg/controller/volume/attachdetach/reconciler, MountedByNode); the taint
// out-of-service would hurry it too, but for the volumes of all drivers, which nobody has fenced.
func (c *Controller) release(ctx context.Context, node *corev1.Node, volumes []*volume) error {
	if node == nil {
		return nil
	}
	if !hasTaint(node, Taint) {
		now := metav1.Now()
		taint := corev1.Taint{Key: Taint, Effect: corev1.TaintEffectNoSchedule, TimeAdded: &now}
		if err := c.cfg.API.SetTaints(ctx, node, append(slices.Clone(node.Spec.Taints), taint)); err != nil {
			return err
		}
	}
	if c.tainted != nil {
		c.tainted[node.Name] = true
	}
	node, err := c.cfg.API.Node(ctx, node.Name) // changed by the line above
	if errors.Is(err, trivet.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	left := slices.DeleteFunc(slices.Clone(node.Status.VolumesInUse), func(name corev1.UniqueVolumeName) bool {
		return slices.ContainsFunc(volumes, func(v *volume) bool { return v.fenced && uniqueName(v.handle) == name })
	})
	if len(left) == len(node.Status.VolumesInUse) {
		return nil
	}
	return c.cfg.API.SetVolumesInUse(ctx, node, left)
}

// uniqueName is what Kubernetes calls a volume in the status of a node (pkg/volume/util, GetUniqueVolumeName, with
// the volume name of pkg/volume/csi, csi_plugin.go, GetVolumeName).
func uniqueName(handle string) corev1.UniqueVolumeName {
	return corev1.UniqueVolumeName("kubernetes.io/csi/" + trivet.DriverName + "^" + handle)
}

// removePods removes the pods all of whose volumes are fenced, and marks the volumes of the others.
func (c *Controller) removePods(ctx context.Context, pods []pod) error {
	var errs []error
	for _, p := range pods {
		err := c.removePod(ctx, p)
		if err != nil {
			for _, v := range p.volumes {
				v.inUse = true
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (c *Controller) removePod(ctx context.Context, p pod) error {
	for _, v := range p.volumes {
		if !v.fenced {
			return fmt.Errorf("pod %s/%s stays: volume %s is not fenced: %w", p.Namespace, p.Name, v.handle,
				trivet.ErrUnavailable)
		}
	}
	if err := c.cfg.API.RemovePod(ctx, &p.Pod); err != nil {
		return err
	}
	c.log.Warn("failover: pod removed from a dead node", "node", p.Spec.NodeName, "namespace", p.Namespace, "pod", p.Name)
	return nil
}

// removeAttachments deletes the attachments of the volumes that are fenced and that no pod of the node uses.
func (c *Controller) removeAttachments(ctx context.Context, volumes []*volume) error {
	var errs []error
	for _, v := range volumes {
		if !v.fenced || v.inUse || v.attachment.DeletionTimestamp != nil {
			continue
		}
		errs = append(errs, c.cfg.API.DeleteVolumeAttachment(ctx, &v.attachment))
	}
	return errors.Join(errs...)
}
