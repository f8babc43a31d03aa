package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
)

// Names of the protocol.
const (
	group          = "hello.example.com"
	finalizer      = "populator.storage.k8s.io/populate-target-protection"
	populatedFrom  = group + "/populated-from"
	selectedNode   = "volume.kubernetes.io/selected-node"
	mountPath      = "/mnt/"
	claimsOf       = "/api/v1/namespaces/%s/persistentvolumeclaims"
	podsOf         = "/api/v1/namespaces/%s/pods"
	hellosOf       = "/apis/" + group + "/v1alpha1/namespaces/%s/hellos/%s"
	firstConsumer  = "WaitForFirstConsumer"
	phaseLost      = "Lost"
	phaseSucceeded = "Succeeded"
)

// controller populates claims. Each round looks at each and does the next step that is due, so that it may stop anywhere.
type controller struct {
	api       *client
	namespace string
	image     string
}

// round looks at every claim once.
func (c *controller) round() error {
	var list struct{ Items []claim }
	if err := c.api.get("/api/v1/persistentvolumeclaims", &list); err != nil {
		return err
	}
	var errs []error
	for i := range list.Items {
		p := &list.Items[i]
		source := p.Spec.DataSourceRef
		if source == nil || source.APIGroup != group || source.Kind != "Hello" || p.Metadata.Namespace == c.namespace {
			continue
		}
		if err := c.claim(p); err != nil {
			errs = append(errs, fmt.Errorf("claim %s/%s: %w", p.Metadata.Namespace, p.Metadata.Name, err))
		}
	}
	return errors.Join(errs...)
}

// claim does the next step for one claim.
func (c *controller) claim(p *claim) error {
	name := "populate-" + p.Metadata.UID
	if p.Spec.VolumeName != "" || p.Metadata.DeletionTimestamp != "" {
		return c.cleanUp(p, name)
	}
	if ready, err := c.nodeIsChosen(p); err != nil || !ready {
		return err
	}
	var hello struct {
		Spec struct{ FileName, FileContents string }
	}
	err := c.api.get(fmt.Sprintf(hellosOf, p.Metadata.Namespace, p.Spec.DataSourceRef.Name), &hello)
	if isNotFound(err) {
		return nil // it may still come
	}
	if err != nil {
		return err
	}
	if !slices.Contains(p.Metadata.Finalizers, finalizer) { // it must not go while the pod writes
		return c.setFinalizers(p, append(p.Metadata.Finalizers, finalizer))
	}
	var prime claim
	err = c.api.get(fmt.Sprintf(claimsOf, c.namespace)+"/"+name, &prime)
	if isNotFound(err) {
		return c.api.post(fmt.Sprintf(claimsOf, c.namespace), p.prime(c.namespace, name))
	}
	if err != nil {
		return err
	}
	var pod struct{ Status struct{ Phase string } }
	err = c.api.get(fmt.Sprintf(podsOf, c.namespace)+"/"+name, &pod)
	if isNotFound(err) {
		return c.api.post(fmt.Sprintf(podsOf, c.namespace), c.pod(p, name, hello.Spec.FileName, hello.Spec.FileContents))
	}
	if err != nil || pod.Status.Phase != phaseSucceeded {
		return err
	}
	return c.handOver(p, &prime)
}

// nodeIsChosen reports whether the volume may be made: of a class that waits for the pod, once that has a node.
func (c *controller) nodeIsChosen(p *claim) (bool, error) {
	if p.Spec.StorageClassName == "" || p.Metadata.Annotations[selectedNode] != "" {
		return true, nil
	}
	var class struct{ VolumeBindingMode string }
	err := c.api.get("/apis/storage.k8s.io/v1/storageclasses/"+p.Spec.StorageClassName, &class)
	return err == nil && class.VolumeBindingMode != firstConsumer, err
}

// pod is the pod that writes the file.
func (c *controller) pod(p *claim, name, file, contents string) any {
	container := map[string]any{
		"name": "populate", "image": c.image, "imagePullPolicy": "IfNotPresent",
		"args":         []string{"--mode=populate", "--file-name=" + mountPath + file, "--file-contents=" + contents},
		"volumeMounts": []any{map[string]any{"name": "target", "mountPath": mountPath}},
	}
	spec := map[string]any{
		"restartPolicy": "Never", "containers": []any{container},
		"volumes": []any{map[string]any{"name": "target", "persistentVolumeClaim": map[string]any{"claimName": name}}},
	}
	if node := p.Metadata.Annotations[selectedNode]; node != "" {
		spec["nodeName"] = node
	}
	return map[string]any{
		"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name, "namespace": c.namespace}, "spec": spec,
	}
}

// handOver gives the volume of the own claim to the one that asked for it.
func (c *controller) handOver(p, prime *claim) error {
	path := "/api/v1/persistentvolumes/" + prime.Spec.VolumeName
	var pv struct{ Spec struct{ ClaimRef reference } }
	if err := c.api.get(path, &pv); err != nil {
		return err
	}
	if pv.Spec.ClaimRef.UID == p.Metadata.UID {
		return nil // Kubernetes binds it
	}
	return c.api.patch(path, map[string]any{
		"metadata": map[string]any{"annotations": map[string]string{
			populatedFrom: p.Metadata.Namespace + "/" + p.Spec.DataSourceRef.Name,
		}},
		"spec": map[string]any{"claimRef": reference{
			Namespace: p.Metadata.Namespace, Name: p.Metadata.Name, UID: p.Metadata.UID,
			ResourceVersion: p.Metadata.ResourceVersion,
		}},
	})
}

// cleanUp removes the own claim and pod of a claim that has its volume, or is being deleted.
func (c *controller) cleanUp(p *claim, name string) error {
	if !slices.Contains(p.Metadata.Finalizers, finalizer) {
		return nil
	}
	var prime claim
	err := c.api.get(fmt.Sprintf(claimsOf, c.namespace)+"/"+name, &prime)
	switch {
	case isNotFound(err):
		return c.setFinalizers(p, slices.DeleteFunc(slices.Clone(p.Metadata.Finalizers), func(f string) bool {
			return f == finalizer
		}))
	case err != nil:
		return err
	case p.Spec.VolumeName != "" && prime.Status.Phase != phaseLost:
		return nil // as long as it is Bound, its deletion would be that of the volume
	}
	return errors.Join(c.remove(fmt.Sprintf(podsOf, c.namespace)+"/"+name),
		c.remove(fmt.Sprintf(claimsOf, c.namespace)+"/"+name))
}

func (c *controller) remove(path string) error {
	if err := c.api.do(http.MethodDelete, path, "", nil, nil); err != nil && !isNotFound(err) {
		return err
	}
	return nil
}

func (c *controller) setFinalizers(p *claim, finalizers []string) error {
	return c.api.patch(fmt.Sprintf(claimsOf, p.Metadata.Namespace)+"/"+p.Metadata.Name, map[string]any{
		"metadata": map[string]any{"finalizers": finalizers, "resourceVersion": p.Metadata.ResourceVersion},
	})
}
