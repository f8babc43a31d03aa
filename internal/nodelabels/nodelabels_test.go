package nodelabels_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/kube"
	"github.com/trivet-csi/trivet/internal/nodelabels"
)

const (
	zoneKey = "topology.csi.trivet.dev/zone"
	rackKey = "topology.csi.trivet.dev/rack"
)

var keys = kube.PlaceLabels{Zone: "topology.kubernetes.io/zone", Rack: "example.com/rack"}

// world is the nodes of a Kubernetes and of a Trivet, and a journal of what is changed, in order.
type world struct {
	t       *testing.T
	labels  map[string]map[string]string
	nodes   []*api.Node
	leads   bool
	refuse  error // of PlaceNode
	journal []string
}

// RoundTrip is the API server.
func (w *world) RoundTrip(r *http.Request) (*http.Response, error) {
	rec := httptest.NewRecorder()
	rec.Header().Set("Content-Type", "application/json")
	name, one := strings.CutPrefix(r.URL.Path, "/api/v1/nodes/")
	switch {
	case r.Method == http.MethodGet && r.URL.Path == "/api/v1/nodes":
		assert.Contains(w.t, r.Header.Get("Accept"), "as=PartialObjectMetadataList", "all of all nodes is a lot")
		list := metav1.PartialObjectMetadataList{}
		for n, labels := range w.labels {
			list.Items = append(list.Items, metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Name: n, Labels: labels}})
		}
		assert.NoError(w.t, json.NewEncoder(rec).Encode(list))
	case r.Method == http.MethodPatch && one:
		body, err := io.ReadAll(r.Body)
		assert.NoError(w.t, err)
		var patch struct {
			Metadata struct{ Labels map[string]*string }
		}
		assert.NoError(w.t, json.Unmarshal(body, &patch))
		for k, v := range patch.Metadata.Labels {
			if delete(w.labels[name], k); v != nil {
				w.labels[name][k] = *v
			}
		}
		w.journal = append(w.journal, "label "+name)
	default:
		http.Error(rec, r.Method+" "+r.URL.Path, http.StatusNotFound)
	}
	return rec.Result(), nil
}

func (w *world) ListNodes(context.Context, *api.ListNodesRequest, ...grpc.CallOption) (*api.ListNodesResponse, error) {
	return &api.ListNodesResponse{Nodes: w.nodes}, nil
}

func (w *world) PlaceNode(_ context.Context, r *api.PlaceNodeRequest, _ ...grpc.CallOption) (*api.NodeStatus, error) {
	said := "place " + r.GetNode()
	if r.Zone != nil {
		said += " zone=" + r.GetZone()
	}
	if r.Rack != nil {
		said += " rack=" + r.GetRack()
	}
	w.journal = append(w.journal, said)
	if w.refuse != nil {
		return nil, w.refuse
	}
	for _, n := range w.nodes {
		if n.GetId() != r.GetNode() {
			continue
		}
		if r.Zone != nil {
			n.Zone, n.ZoneSet = r.GetZone(), true
		}
		if r.Rack != nil {
			n.Rack, n.RackSet = r.GetRack(), true
		}
	}
	return &api.NodeStatus{}, nil
}

func newWorld(t *testing.T, labels kube.PlaceLabels) (*world, *nodelabels.Controller) {
	t.Helper()
	w := &world{t: t, labels: map[string]map[string]string{}, leads: true}
	kubeAPI, err := kube.NewAPI(&rest.Config{Host: "http://api", Transport: w}, "trivet-system")
	require.NoError(t, err)
	c, err := nodelabels.New(nodelabels.Config{
		API: kubeAPI, Servers: w, Leads: func() bool { return w.leads }, Labels: labels,
	})
	require.NoError(t, err)
	return w, c
}

// round runs one and returns what it changed.
func (w *world) round(c *nodelabels.Controller) []string {
	w.t.Helper()
	w.journal = nil
	require.NoError(w.t, c.Round(w.t.Context()))
	return w.journal
}

func TestLabelsAreCarriedOver(t *testing.T) {
	t.Parallel()
	w, c := newWorld(t, keys)
	w.nodes = []*api.Node{{Id: "n1", Zone: "a"}, {Id: "elsewhere", Zone: "a"}}
	w.labels["n1"] = map[string]string{keys.Zone: "a", keys.Rack: "r1", zoneKey: "a"}
	w.labels["not-ours"] = map[string]string{keys.Zone: "a"}
	assert.Equal(t, []string{"place n1 rack=r1"}, w.round(c))
	assert.Empty(t, w.round(c), "nothing is said twice")

	// The label that a kubelet made comes first: it refuses to register a driver that says another value.
	w.labels["n1"][rackKey] = "r1"
	w.labels["n1"][keys.Zone], w.labels["n1"][keys.Rack] = "b", "r2"
	assert.Equal(t, []string{"label n1", "place n1 zone=b rack=r2"}, w.round(c))
	assert.Equal(t, map[string]string{keys.Zone: "b", keys.Rack: "r2", zoneKey: "b", rackKey: "r2"}, w.labels["n1"])

	// One that is taken away is taken away everywhere.
	delete(w.labels["n1"], keys.Rack)
	assert.Equal(t, []string{"label n1", "place n1 rack="}, w.round(c))
	assert.NotContains(t, w.labels["n1"], rackKey)

	w.leads = false
	w.labels["n1"][keys.Zone] = "c"
	assert.Empty(t, w.round(c), "the other one does it")
}

// TestWhatServersSayCounts without labels, and what kubelets made of what they said before is put right all the same.
func TestWhatServersSayCounts(t *testing.T) {
	t.Parallel()
	for name, labels := range map[string]kube.PlaceLabels{"no label to look at": {}, "no label on the node": keys} {
		w, c := newWorld(t, labels)
		w.nodes = []*api.Node{{Id: "n1", Zone: "b"}}
		w.labels["n1"] = map[string]string{zoneKey: "a", rackKey: "r", "other": "x"}
		assert.Equal(t, []string{"label n1"}, w.round(c), name)
		assert.Equal(t, map[string]string{zoneKey: "b", "other": "x"}, w.labels["n1"], name)
		assert.Empty(t, w.round(c), name)
	}
}

// TestRefusal of one node does not keep the others from their place, and is tried again.
func TestRefusal(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, c := newWorld(t, keys)
		w.nodes = []*api.Node{{Id: "n1"}, {Id: "n2"}}
		for _, n := range w.nodes {
			w.labels[n.GetId()] = map[string]string{keys.Zone: "a"}
		}
		w.refuse = errors.New("no quorum")
		err := c.Round(t.Context())
		require.ErrorContains(t, err, "place node n1")
		require.ErrorContains(t, err, "no quorum")
		assert.Equal(t, []string{"place n1 zone=a", "place n2 zone=a"}, w.journal)
		w.refuse, w.journal = nil, nil
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c.Run(ctx)
		assert.Equal(t, []string{"place n1 zone=a", "place n2 zone=a"}, w.journal)
	})
}

func TestConfig(t *testing.T) {
	t.Parallel()
	w, _ := newWorld(t, keys)
	_, err := nodelabels.New(nodelabels.Config{Servers: w, Leads: func() bool { return true }})
	require.ErrorIs(t, err, trivet.ErrInvalid)
	kubeAPI, err := kube.NewAPI(&rest.Config{Host: "http://api", Transport: w}, "trivet-system")
	require.NoError(t, err)
	_, err = nodelabels.New(nodelabels.Config{
		API: kubeAPI, Servers: w, Leads: func() bool { return true }, Labels: kube.PlaceLabels{Rack: "a b"},
	})
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "a b")
}
