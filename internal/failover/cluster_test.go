package failover_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/failover"
	"github.com/trivet-csi/trivet/internal/kube"
)

// cluster is the part of a Kubernetes that is used, behind an API server in process, and the catalogue of a Trivet
// on it. Everything that changes either is written to one journal, in order.
type cluster struct {
	t   *testing.T
	api *kube.API

	mu          sync.Mutex
	version     int
	nodes       map[string]*corev1.Node
	leases      map[string]*coordinationv1.Lease
	namespaces  map[string]*corev1.Namespace
	pvs         map[string]*corev1.PersistentVolume
	pods        map[string]*corev1.Pod // by namespace/name
	attachments map[string]*storagev1.VolumeAttachment
	refuse      func(method, path string) int // a code other than 0 is the answer

	away     map[trivet.NodeID]bool
	fenceErr map[string]error // of a volume's fence
	fenced   map[string]bool
	leads    bool
	journal  []string
}

func newCluster(t *testing.T, nodes ...string) *cluster {
	t.Helper()
	c := &cluster{
		t: t, nodes: map[string]*corev1.Node{}, leases: map[string]*coordinationv1.Lease{},
		namespaces: map[string]*corev1.Namespace{}, pvs: map[string]*corev1.PersistentVolume{},
		pods: map[string]*corev1.Pod{}, attachments: map[string]*storagev1.VolumeAttachment{},
		away: map[trivet.NodeID]bool{}, fenceErr: map[string]error{}, fenced: map[string]bool{}, leads: true,
	}
	for _, n := range nodes {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n, ResourceVersion: "1"}}
		node.Spec.Taints = []corev1.Taint{{Key: "somebody/else", Effect: corev1.TaintEffectNoSchedule}}
		c.nodes[n], c.away[trivet.NodeID(n)] = node, false
		c.setReady(n, corev1.ConditionTrue)
		c.renew(n)
	}
	c.namespace("default", "")
	mux := http.NewServeMux()
	c.routes(mux)
	api, err := kube.NewAPI(&rest.Config{Host: "http://api", Transport: inProcess{c, mux}}, "trivet-system")
	require.NoError(t, err)
	c.api = api
	return c
}

// inProcess answers requests without a network, so that time in a bubble can pass.
type inProcess struct {
	c       *cluster
	handler http.Handler
}

func (p inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	p.c.mu.Lock()
	refuse := p.c.refuse
	p.c.mu.Unlock()
	w := httptest.NewRecorder()
	if refuse != nil {
		if code := refuse(r.Method, r.URL.Path); code != 0 {
			http.Error(w, "refused", code)
			return w.Result(), nil
		}
	}
	p.handler.ServeHTTP(w, r)
	return w.Result(), nil
}

func (c *cluster) routes(mux *http.ServeMux) {
	handle := func(pattern string, f func(r *http.Request) any) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			c.mu.Lock()
			defer c.mu.Unlock()
			answer(c.t, w, f(r))
		})
	}
	handle("GET /api/v1/nodes", func(*http.Request) any {
		list := &corev1.NodeList{TypeMeta: kind("v1", "NodeList")}
		for _, n := range c.nodes {
			list.Items = append(list.Items, *n)
		}
		return list
	})
	handle("GET /api/v1/nodes/{name}", func(r *http.Request) any {
		return one("v1", "Node", c.nodes[r.PathValue("name")])
	})
	handle("PATCH /api/v1/nodes/{name}", func(r *http.Request) any { return c.patch(r, "taints") })
	handle("PATCH /api/v1/nodes/{name}/status", func(r *http.Request) any { return c.patch(r, "volumesInUse") })
	handle("GET /apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", func(*http.Request) any {
		list := &coordinationv1.LeaseList{TypeMeta: kind("coordination.k8s.io/v1", "LeaseList")}
		for _, l := range c.leases {
			list.Items = append(list.Items, *l)
		}
		return list
	})
	handle("GET /api/v1/namespaces/{name}", func(r *http.Request) any {
		return one("v1", "Namespace", c.namespaces[r.PathValue("name")])
	})
	handle("GET /api/v1/persistentvolumes/{name}", func(r *http.Request) any {
		return one("v1", "PersistentVolume", c.pvs[r.PathValue("name")])
	})
	handle("GET /api/v1/pods", func(r *http.Request) any {
		node, ok := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "spec.nodeName=")
		assert.True(c.t, ok, "all pods of a cluster are a lot")
		list := &corev1.PodList{TypeMeta: kind("v1", "PodList")}
		for _, p := range c.pods {
			if p.Spec.NodeName == node {
				list.Items = append(list.Items, *p)
			}
		}
		slices.SortFunc(list.Items, func(a, b corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
		return list
	})
	handle("GET /apis/storage.k8s.io/v1/volumeattachments", func(*http.Request) any {
		list := &storagev1.VolumeAttachmentList{TypeMeta: kind("storage.k8s.io/v1", "VolumeAttachmentList")}
		for _, a := range c.attachments {
			list.Items = append(list.Items, *a)
		}
		slices.SortFunc(list.Items, func(a, b storagev1.VolumeAttachment) int { return strings.Compare(a.Name, b.Name) })
		return list
	})
	handle("DELETE /api/v1/namespaces/{namespace}/pods/{name}", func(r *http.Request) any {
		key := r.PathValue("namespace") + "/" + r.PathValue("name")
		p := c.pods[key]
		return c.remove(r, "pod "+key, p == nil, func() types.UID { return p.UID }, func() { delete(c.pods, key) })
	})
	handle("DELETE /apis/storage.k8s.io/v1/volumeattachments/{name}", func(r *http.Request) any {
		name := r.PathValue("name")
		a := c.attachments[name]
		return c.remove(r, "attachment "+name, a == nil, func() types.UID { return a.UID },
			func() { delete(c.attachments, name) })
	})
}

func kind(version, name string) metav1.TypeMeta {
	return metav1.TypeMeta{APIVersion: version, Kind: name}
}

// one returns an object with its kind, which typed objects do not say, or 404.
func one[T any](version, name string, o *T) any {
	if o == nil {
		return failure(http.StatusNotFound, metav1.StatusReasonNotFound)
	}
	b, err := json.Marshal(o)
	if err != nil {
		return failure(http.StatusInternalServerError, metav1.StatusReasonInternalError)
	}
	var out map[string]any
	if err := json.Unmarshal(b, &out); err != nil {
		return failure(http.StatusInternalServerError, metav1.StatusReasonInternalError)
	}
	out["apiVersion"], out["kind"] = version, name
	return out
}

func failure(code int32, reason metav1.StatusReason) *metav1.Status {
	return &metav1.Status{TypeMeta: kind("v1", "Status"), Status: metav1.StatusFailure, Reason: reason, Code: code}
}

func answer(t *testing.T, w http.ResponseWriter, o any) {
	w.Header().Set("Content-Type", "application/json")
	if s, ok := o.(*metav1.Status); ok && s.Code != 0 {
		w.WriteHeader(int(s.Code))
	}
	assert.NoError(t, json.NewEncoder(w).Encode(o))
}

// patch applies a merge patch of one list to a node, if it was made for the version that it has.
func (c *cluster) patch(r *http.Request, what string) any {
	n := c.nodes[r.PathValue("name")]
	var p struct {
		Metadata struct{ ResourceVersion string }
		Spec     struct{ Taints []corev1.Taint }
		Status   struct{ VolumesInUse []corev1.UniqueVolumeName }
	}
	assert.NoError(c.t, json.NewDecoder(r.Body).Decode(&p))
	assert.Equal(c.t, string(types.MergePatchType), r.Header.Get("Content-Type"))
	switch {
	case n == nil:
		return failure(http.StatusNotFound, metav1.StatusReasonNotFound)
	case p.Metadata.ResourceVersion != n.ResourceVersion:
		return failure(http.StatusConflict, metav1.StatusReasonConflict)
	}
	switch what {
	case "taints":
		n.Spec.Taints = p.Spec.Taints
		var keys []string
		for _, t := range n.Spec.Taints {
			keys = append(keys, t.Key)
		}
		c.note("taints of %s: %s", n.Name, strings.Join(keys, " "))
	case "volumesInUse":
		n.Status.VolumesInUse = p.Status.VolumesInUse
		c.note("in use on %s: %v", n.Name, n.Status.VolumesInUse)
	}
	c.touch(n)
	return one("v1", "Node", n)
}

func (c *cluster) touch(o metav1.Object) {
	c.version++
	o.SetResourceVersion(strconv.Itoa(1000 + c.version))
}

// remove deletes an object if it is the one that is meant.
func (c *cluster) remove(r *http.Request, what string, absent bool, uid func() types.UID, drop func()) any {
	var o metav1.DeleteOptions
	assert.NoError(c.t, json.NewDecoder(r.Body).Decode(&o))
	if !assert.NotNil(c.t, o.Preconditions, "%s: another one of that name may be there by now", what) {
		return failure(http.StatusBadRequest, metav1.StatusReasonBadRequest)
	}
	switch {
	case absent:
		return failure(http.StatusNotFound, metav1.StatusReasonNotFound)
	case *o.Preconditions.UID != uid():
		return failure(http.StatusConflict, metav1.StatusReasonConflict)
	}
	if strings.HasPrefix(what, "pod ") && assert.NotNil(c.t, o.GracePeriodSeconds) {
		assert.Zero(c.t, *o.GracePeriodSeconds, "nobody is there to end it in good order")
	}
	drop()
	c.note("remove %s", what)
	return &metav1.Status{TypeMeta: kind("v1", "Status"), Status: metav1.StatusSuccess}
}

func (c *cluster) note(format string, args ...any) {
	c.journal = append(c.journal, fmt.Sprintf(format, args...))
}

// take returns what was done since it was last called.
func (c *cluster) take() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.journal
	c.journal = nil
	return out
}

// Nodes implements failover.Catalogue.
func (c *cluster) Nodes(context.Context) (map[trivet.NodeID]bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[trivet.NodeID]bool{}
	for n, away := range c.away {
		out[n] = away
	}
	return out, nil
}

// Fence implements failover.Catalogue.
func (c *cluster) Fence(_ context.Context, volume string, node trivet.NodeID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.fenceErr[volume]; err != nil {
		c.note("no fence %s", volume)
		return err
	}
	if !c.away[node] {
		return fmt.Errorf("node %s: %w", node, trivet.ErrInUse)
	}
	if !c.fenced[volume] {
		c.note("fence %s from %s", volume, node)
	}
	c.fenced[volume] = true
	return nil
}

func (c *cluster) namespace(name, failoverAnnotation string) {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if failoverAnnotation != "" {
		ns.Annotations = map[string]string{failover.OptOut: failoverAnnotation}
	}
	c.namespaces[name] = ns
}

func (c *cluster) setReady(node string, status corev1.ConditionStatus) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.nodes[node]
	n.Status.Conditions = []corev1.NodeCondition{
		{Type: corev1.NodeDiskPressure, Status: corev1.ConditionFalse}, {Type: corev1.NodeReady, Status: status},
	}
	c.touch(n)
}

// renew is what a kubelet does every ten seconds.
func (c *cluster) renew(node string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, seconds := metav1.NewMicroTime(time.Now()), int32(40)
	c.leases[node] = &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: node},
		Spec:       coordinationv1.LeaseSpec{RenewTime: &now, LeaseDurationSeconds: &seconds},
	}
}

func (c *cluster) setAway(node string, away bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away[trivet.NodeID(node)] = away
}

// volume makes a claim with its volume, attached to a node.
func (c *cluster) volume(namespace, claim, node string) (handle string) {
	handle = "vol-" + claim
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv-" + claim}}
	pv.Spec.CSI = &corev1.CSIPersistentVolumeSource{Driver: trivet.DriverName, VolumeHandle: handle}
	pv.Spec.ClaimRef = &corev1.ObjectReference{Namespace: namespace, Name: claim}
	c.pvs[pv.Name] = pv
	a := &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: "va-" + claim, UID: types.UID("uid-va-" + claim)}}
	a.Spec = storagev1.VolumeAttachmentSpec{
		Attacher: trivet.DriverName, NodeName: node,
		Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &pv.Name},
	}
	c.attachments[a.Name] = a
	c.nodes[node].Status.VolumesInUse = append(c.nodes[node].Status.VolumesInUse,
		corev1.UniqueVolumeName("kubernetes.io/csi/csi.trivet.dev^"+handle))
	return handle
}

// pod makes a pod of a controller of that kind ("" = of none) on a node, which uses claims.
func (c *cluster) pod(namespace, name, node, owner string, claims ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: namespace, Name: name, UID: types.UID("uid-" + name), ResourceVersion: "1",
	}}
	p.Spec.NodeName, p.Status.Phase = node, corev1.PodRunning
	if owner != "" {
		yes := true
		p.OwnerReferences = []metav1.OwnerReference{{Kind: owner, Name: "owner", Controller: &yes}}
	}
	for _, claim := range claims {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: claim, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim},
		}})
	}
	c.pods[namespace+"/"+name] = p
	return p
}

// controller returns a controller of the cluster.
func (c *cluster) controller() *failover.Controller {
	c.t.Helper()
	f, err := failover.New(failover.Config{API: c.api, Catalogue: c, Leads: func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.leads
	}})
	require.NoError(c.t, err)
	return f
}

// watch has a controller look every two seconds for some time, beginning now, and returns what was done in it.
func (c *cluster) watch(f *failover.Controller, length time.Duration) []string {
	c.t.Helper()
	for end := time.Now().Add(length); !time.Now().After(end); {
		if err := f.Round(c.t.Context()); err != nil {
			c.t.Log(err)
		}
		<-time.After(2 * time.Second) // of the bubble
	}
	return c.take()
}
