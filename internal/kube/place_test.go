package kube_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
	"github.com/trivet-csi/trivet/internal/pki"
)

// labelled has the labels of nodes; a nil map is an API server that does not answer.
type labelled map[string]map[string]string

// Node implements kube.NodeReader.
func (l labelled) Node(_ context.Context, name string) (*corev1.Node, error) {
	labels, ok := l[name]
	if !ok {
		return nil, trivet.ErrUnavailable
	}
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, nil
}

var placeLabels = kube.PlaceLabels{Zone: "topology.kubernetes.io/zone", Rack: "example.com/rack"}

func newPlaceIssuer(t *testing.T, ca *pki.CA, r kube.Reviewer, labels kube.PlaceLabels, nodes kube.NodeReader,
) *kube.Issuer {
	t.Helper()
	i, err := kube.NewIssuer(kube.IssuerConfig{
		CA: ca, Reviewer: r, NodeAccount: nodeAccount, Labels: labels, Nodes: nodes,
	})
	require.NoError(t, err)
	return i
}

// A pod learns of the place of its own node, and of no other; whoever it is not gets nothing.
func TestIssuerPlace(t *testing.T) {
	t.Parallel()
	s, ca := newAPIServer(t), newCA(t)
	s.tokens["n1"], s.tokens["n2"], s.tokens["n3"] = podOn("n1"), podOn("n2"), podOn("n3")
	s.tokens["stranger"] = with(podOn("n1"), func(st *authv1.TokenReviewStatus) {
		st.User.Username = "system:serviceaccount:default:default"
	})
	nodes := labelled{
		"n1": {placeLabels.Zone: "a", placeLabels.Rack: "r7", "other": "x"},
		"n2": {placeLabels.Rack: "r8"},
	}
	get := func(labels kube.PlaceLabels, token string) (int, string) {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/place?node=n2", http.NoBody)
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		w := httptest.NewRecorder()
		newPlaceIssuer(t, ca, s.client(), labels, nodes).ServeHTTP(w, r)
		return w.Code, w.Body.String()
	}
	for _, tt := range []struct {
		name, token string
		labels      kube.PlaceLabels
		code        int
		says        string
	}{
		{"both", "n1", placeLabels, http.StatusOK, `{"zone":"a","rack":"r7"}`},
		{"one of two", "n2", placeLabels, http.StatusOK, `{"rack":"r8"}`},
		{"only the rack is looked at", "n1", kube.PlaceLabels{Rack: placeLabels.Rack}, http.StatusOK, `{"rack":"r7"}`},
		{"no answer of the API server", "n3", placeLabels, http.StatusServiceUnavailable, "node n3, come again"},
		{"no token", "", placeLabels, http.StatusUnauthorized, "no token"},
		{"somebody else's", "stranger", placeLabels, http.StatusForbidden, "only"},
		{"no labels", "n1", kube.PlaceLabels{}, http.StatusNotFound, "--rack-label"},
	} {
		code, body := get(tt.labels, tt.token)
		assert.Equal(t, tt.code, code, tt.name)
		assert.Contains(t, body, tt.says, tt.name)
	}
	_, err := kube.NewIssuer(kube.IssuerConfig{
		CA: ca, NodeAccount: nodeAccount, Labels: kube.PlaceLabels{Rack: "no label"},
	})
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, `label "no label"`)
}

// A node writes where it stands; when nobody answers the second time, or it is refused, it stands where it did.
func TestWritePlace(t *testing.T) {
	t.Parallel()
	e := newEnrollment(t)
	var place atomic.Pointer[map[string]string]
	place.Store(&map[string]string{placeLabels.Zone: "a", placeLabels.Rack: "r1"})
	issuer := newPlaceIssuer(t, e.ca, e.api.client(), placeLabels, changing{&place})
	address, _ := serve(t, issuer)
	cfg := e.cfg
	cfg.Issuer = "https://" + address
	file := filepath.Join(t.TempDir(), "place.json")

	_, err := kube.ReadPlace(file)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	require.NoError(t, kube.WritePlace(within(t, time.Minute), cfg, file))
	read := func() kube.Place {
		t.Helper()
		p, err := kube.ReadPlace(file)
		require.NoError(t, err)
		return p
	}
	require.Equal(t, kube.Place{Zone: "a", Rack: "r1"}, read())
	place.Store(&map[string]string{placeLabels.Rack: "r2"})
	require.Eventually(t, func() bool { // without an answer in time it keeps the one of before, as it is to
		err := kube.WritePlace(within(t, time.Minute), cfg, file)
		p, errRead := kube.ReadPlace(file)
		return err == nil && errRead == nil && p == kube.Place{Rack: "r2"}
	}, time.Minute, time.Millisecond, "it moved")

	place.Store(nil)
	soon, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	require.NoError(t, kube.WritePlace(soon, cfg, file))
	require.Equal(t, kube.Place{Rack: "r2"}, read())
	assert.Contains(t, e.log.String(), "the one of before is kept")
	plain, _ := serve(t, newIssuer(t, e.ca, e.api.client(), nil)) // has no labels
	cfg.Issuer = "https://" + plain
	require.NoError(t, kube.WritePlace(within(t, time.Minute), cfg, file))
	require.Equal(t, kube.Place{Rack: "r2"}, read())

	file = filepath.Join(t.TempDir(), "place.json")
	err = kube.WritePlace(within(t, time.Minute), cfg, file)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "--rack-label")
	cfg.Issuer = "https://" + address
	soon, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, kube.WritePlace(soon, cfg, file), trivet.ErrUnavailable)
	mustWrite(t, file, []byte("{"))
	_, err = kube.ReadPlace(file)
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

// changing is an API server to which every node has the same labels, which change; nil: it does not answer.
type changing struct {
	labels *atomic.Pointer[map[string]string]
}

// Node implements kube.NodeReader.
func (c changing) Node(ctx context.Context, name string) (*corev1.Node, error) {
	l := c.labels.Load()
	if l == nil {
		return nil, trivet.ErrUnavailable
	}
	return labelled{name: *l}.Node(ctx, name)
}
