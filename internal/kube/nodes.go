package kube

import (
	"context"
	"encoding/json"
	"fmt"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"github.com/trivet-csi/trivet"
)

// What a controller sees of nodes, and of pods and volumes on them, in all namespaces. The errors are those of API.

// nodeLeases is the namespace where kubelets renew a Lease each, by the name of their node
// (k8s.io/api/core/v1, NamespaceNodeLease).
const nodeLeases = corev1.NamespaceNodeLease

// Node returns a node.
func (a *API) Node(ctx context.Context, name string) (*corev1.Node, error) {
	n := &corev1.Node{}
	err := a.core.Get().Resource("nodes").Name(name).Do(ctx).Into(n)
	return n, wrapAny("get Node", name, err)
}

// Nodes returns all nodes.
func (a *API) Nodes(ctx context.Context) ([]corev1.Node, error) {
	list := &corev1.NodeList{}
	err := a.core.Get().Resource("nodes").Do(ctx).Into(list)
	return list.Items, wrapAny("list", "Nodes", err)
}

// NodeLabels returns the labels of all nodes, by name, as the API server has them in its cache: without the rest of
// the nodes, which is large.
func (a *API) NodeLabels(ctx context.Context) (map[string]map[string]string, error) {
	const onlyMetadata = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
	body, err := a.core.Get().Resource("nodes").Param("resourceVersion", "0").SetHeader("Accept", onlyMetadata).
		Do(ctx).Raw()
	if err != nil {
		return nil, wrapAny("list", "labels of Nodes", err)
	}
	var list metav1.PartialObjectMetadataList
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, fmt.Errorf("list labels of Nodes: %v: %w", err, trivet.ErrUnavailable)
	}
	labels := make(map[string]map[string]string, len(list.Items))
	for i := range list.Items {
		labels[list.Items[i].Name] = list.Items[i].Labels
	}
	return labels, nil
}

// SetNodeLabels gives a node labels, and takes those away that are nil; the others stay as they are.
func (a *API) SetNodeLabels(ctx context.Context, name string, labels map[string]*string) error {
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": labels}})
	if err != nil {
		return fmt.Errorf("patch Node %s: %w", name, err)
	}
	err = a.core.Patch(types.MergePatchType).Resource("nodes").Name(name).Body(body).Do(ctx).Error()
	return wrapAny("patch labels of Node", name, err)
}

// SetTaints replaces the taints of a node, unless it changed since n was read: ErrPending.
func (a *API) SetTaints(ctx context.Context, n *corev1.Node, taints []corev1.Taint) error {
	if taints == nil {
		taints = []corev1.Taint{}
	}
	return a.patchNode(ctx, n, "", map[string]any{"spec": map[string]any{"taints": taints}})
}

// SetVolumesInUse replaces the list of volumes that the status of a node says are mounted there, unless it
// changed since n was read: ErrPending.
func (a *API) SetVolumesInUse(ctx context.Context, n *corev1.Node, volumes []corev1.UniqueVolumeName) error {
	if volumes == nil {
		volumes = []corev1.UniqueVolumeName{}
	}
	return a.patchNode(ctx, n, "status", map[string]any{"status": map[string]any{"volumesInUse": volumes}})
}

// patchNode merges a change into a node. Both lists above are replaced as a whole by a merge patch (RFC 7386).
func (a *API) patchNode(ctx context.Context, n *corev1.Node, subresource string, change map[string]any) error {
	change["metadata"] = map[string]any{"resourceVersion": n.ResourceVersion}
	body, err := json.Marshal(change)
	if err != nil {
		return fmt.Errorf("patch Node %s: %w", n.Name, err)
	}
	r := a.core.Patch(types.MergePatchType).Resource("nodes").Name(n.Name).Body(body)
	if subresource != "" {
		r = r.SubResource(subresource)
	}
	return wrapAny("patch Node", n.Name, r.Do(ctx).Error())
}

// NodeLeases returns the Leases that kubelets renew, by the names of their nodes.
func (a *API) NodeLeases(ctx context.Context) (map[string]*coordinationv1.Lease, error) {
	list := &coordinationv1.LeaseList{}
	err := a.coordination.Get().Namespace(nodeLeases).Resource("leases").Do(ctx).Into(list)
	leases := make(map[string]*coordinationv1.Lease, len(list.Items))
	for i := range list.Items {
		leases[list.Items[i].Name] = &list.Items[i]
	}
	return leases, wrapAny("list Leases in", nodeLeases, err)
}

func (a *API) lease(ctx context.Context, namespace, name string) (*coordinationv1.Lease, error) {
	l := &coordinationv1.Lease{}
	err := a.coordination.Get().Namespace(namespace).Resource("leases").Name(name).Do(ctx).Into(l)
	return l, wrapAny("get Lease", namespace+"/"+name, err)
}

// NamespaceAnnotations returns the annotations of a namespace.
func (a *API) NamespaceAnnotations(ctx context.Context, name string) (map[string]string, error) {
	n := &corev1.Namespace{}
	err := a.core.Get().Resource("namespaces").Name(name).Do(ctx).Into(n)
	return n.Annotations, wrapAny("get Namespace", name, err)
}

// PodsOn returns the pods of all namespaces that are bound to a node.
func (a *API) PodsOn(ctx context.Context, node string) ([]corev1.Pod, error) {
	list := &corev1.PodList{}
	err := a.core.Get().Resource("pods").
		Param("fieldSelector", fields.OneTermEqualSelector("spec.nodeName", node).String()).Do(ctx).Into(list)
	return list.Items, wrapAny("list Pods on", node, err)
}

// RemovePod removes a pod at once, without waiting for its kubelet. Another pod of that name is left alone, and
// an absent one is success.
func (a *API) RemovePod(ctx context.Context, p *corev1.Pod) error {
	now := int64(0)
	options := &metav1.DeleteOptions{
		GracePeriodSeconds: &now, Preconditions: &metav1.Preconditions{UID: &p.UID},
	}
	err := a.core.Delete().Namespace(p.Namespace).Resource("pods").Name(p.Name).Body(options).Do(ctx).Error()
	return goneIsFine(wrapAny("remove Pod", p.Namespace+"/"+p.Name, err))
}

// PersistentVolume returns a PersistentVolume.
func (a *API) PersistentVolume(ctx context.Context, name string) (*corev1.PersistentVolume, error) {
	v := &corev1.PersistentVolume{}
	err := a.core.Get().Resource("persistentvolumes").Name(name).Do(ctx).Into(v)
	return v, wrapAny("get PersistentVolume", name, err)
}

// VolumeAttachments returns all VolumeAttachments.
func (a *API) VolumeAttachments(ctx context.Context) ([]storagev1.VolumeAttachment, error) {
	list := &storagev1.VolumeAttachmentList{}
	err := a.storage.Get().Resource("volumeattachments").Do(ctx).Into(list)
	return list.Items, wrapAny("list", "VolumeAttachments", err)
}

// DeleteVolumeAttachment deletes a VolumeAttachment; it goes once the attacher has taken its finalizer off.
// Another one of that name is left alone, and an absent one is success.
func (a *API) DeleteVolumeAttachment(ctx context.Context, v *storagev1.VolumeAttachment) error {
	options := &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &v.UID}}
	err := a.storage.Delete().Resource("volumeattachments").Name(v.Name).Body(options).Do(ctx).Error()
	return goneIsFine(wrapAny("delete VolumeAttachment", v.Name, err))
}
