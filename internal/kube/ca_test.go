package kube_test

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
	"github.com/trivet-csi/trivet/internal/pki"
)

func newCA(t *testing.T) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA(trivet.ClusterID(trivet.NewUUID()), pki.For(pki.CAValidity))
	require.NoError(t, err)
	return ca
}

// within bounds what a test waits for.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func ensure(t *testing.T, s *apiServer) (*kube.Authority, error) {
	t.Helper()
	api := s.client()
	return kube.EnsureCA(within(t, time.Minute), api, api, nil)
}

func TestEnsureCA(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	a, err := ensure(t, s)
	require.NoError(t, err)
	assert.Equal(t, string(a.CA.CertPEM()), s.data()[kube.KeyCACert])
	parsed, err := pki.ParseCA(s.secret().Data[kube.KeyCACert], s.secret().Data[kube.KeyCAKey])
	require.NoError(t, err)
	assert.Equal(t, a.CA.Cluster(), parsed.Cluster())
	for _, v := range s.data() {
		assert.NotContains(t, v, "PRIVATE KEY")
	}

	// Again: the same. The ConfigMap is made good, and keeps what it says of the birth.
	s.setData(map[string]string{kube.KeyCACert: "old", kube.KeyBirthNode: "n1"})
	again, err := ensure(t, s)
	require.NoError(t, err)
	assert.Equal(t, a.BundlePEM, again.BundlePEM)
	assert.Equal(t, map[string]string{kube.KeyCACert: string(a.BundlePEM), kube.KeyBirthNode: "n1"}, s.data())

	// A rotation: the first certificate signs, all are published.
	next, err := pki.NewCA(a.CA.Cluster(), pki.For(pki.CAValidity))
	require.NoError(t, err)
	key, err := next.KeyPEM()
	require.NoError(t, err)
	both := append(next.CertPEM(), a.CA.CertPEM()...)
	s.setSecret(map[string][]byte{kube.KeyCACert: both, kube.KeyCAKey: key})
	rotated, err := ensure(t, s)
	require.NoError(t, err)
	assert.Equal(t, next.CertPEM(), rotated.CA.CertPEM())
	assert.Equal(t, string(both), s.data()[kube.KeyCACert])
}

// Two Jobs at once get one CA, whoever is first at each step.
func TestEnsureCARace(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	var wg sync.WaitGroup
	got := make([]*kube.Authority, 8)
	for i := range got {
		wg.Go(func() {
			api := s.client()
			a, err := kube.EnsureCA(within(t, time.Minute), api, api, nil)
			if assert.NoError(t, err) {
				got[i] = a
			}
		})
	}
	wg.Wait()
	for _, a := range got {
		require.NotNil(t, a)
		assert.Equal(t, s.secret().Data[kube.KeyCACert], a.BundlePEM)
	}
	assert.Equal(t, string(got[0].BundlePEM), s.data()[kube.KeyCACert])
}

// The other Job makes both objects between this one's looking for the Secret and for the ConfigMap.
func TestEnsureCAMeetsAnother(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	var met atomic.Bool
	other := make(chan []byte, 1)
	s.intercept(func(method, path string) int {
		if method == http.MethodGet && strings.Contains(path, "/configmaps/") && met.CompareAndSwap(false, true) {
			a, err := ensure(t, s)
			if assert.NoError(t, err) {
				other <- a.BundlePEM
			}
		}
		return 0
	})
	a, err := ensure(t, s)
	require.NoError(t, err)
	assert.Equal(t, <-other, a.BundlePEM)
}

// What is there is never overwritten.
func TestEnsureCARefuses(t *testing.T) {
	t.Parallel()
	ca, other := newCA(t), newCA(t)
	key, err := ca.KeyPEM()
	require.NoError(t, err)
	good := map[string][]byte{kube.KeyCACert: ca.CertPEM(), kube.KeyCAKey: key}
	leaf, err := ca.Issue(pki.Identity{Cluster: ca.Cluster(), Role: pki.RoleNode, Name: "n1"}, pki.For(time.Hour))
	require.NoError(t, err)
	shown := map[string]string{kube.KeyCACert: string(other.CertPEM())}
	born := map[string]string{kube.KeyCACert: string(other.CertPEM()), kube.KeyBirthNode: "n1"}
	for _, tt := range []struct {
		name   string
		secret map[string][]byte
		maps   map[string]string
		want   string
	}{
		{"empty secret", map[string][]byte{}, nil, "secret trivet-ca holds no ca"},
		{"no key", map[string][]byte{kube.KeyCACert: ca.CertPEM()}, nil, "secret trivet-ca holds no ca"},
		{
			"garbage",
			map[string][]byte{kube.KeyCACert: []byte("x"), kube.KeyCAKey: []byte("y")},
			nil,
			"secret trivet-ca holds no ca",
		},
		{
			"a leaf",
			map[string][]byte{kube.KeyCACert: leaf.CertPEM, kube.KeyCAKey: leaf.KeyPEM},
			nil,
			"secret trivet-ca holds no ca",
		},
		{
			"two clusters",
			map[string][]byte{kube.KeyCACert: append(ca.CertPEM(), other.CertPEM()...), kube.KeyCAKey: key},
			nil,
			"secret trivet-ca holds no ca",
		},
		{"secret lost", nil, shown, "secret trivet-ca is gone"},
		{"another cluster was born", good, born, "which has been born"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newAPIServer(t)
			s.setSecret(tt.secret)
			if tt.maps != nil {
				s.setData(tt.maps)
			}
			_, err := ensure(t, s)
			require.ErrorIs(t, err, trivet.ErrInvalid)
			require.ErrorContains(t, err, tt.want)
			assert.ErrorContains(t, err, "to begin a new cluster")
			assert.Equal(t, tt.maps, s.data())
			if tt.secret != nil {
				assert.Equal(t, tt.secret, s.secret().Data)
			}
		})
	}
	s := newAPIServer(t) // nothing was born of the other one: its certificate may go
	s.setSecret(good)
	s.setData(shown)
	_, err = ensure(t, s)
	require.NoError(t, err)
	assert.Equal(t, string(ca.CertPEM()), s.data()[kube.KeyCACert])
}

// An API server that does not answer yet is waited for, and not for ever.
func TestEnsureCAWaits(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	var calls atomic.Int32
	s.intercept(func(string, string) int {
		if calls.Add(1) <= 3 {
			return http.StatusForbidden // as while RBAC is being applied
		}
		return 0
	})
	_, err := ensure(t, s)
	require.NoError(t, err)

	api := s.client()
	ctx, cancel := context.WithCancelCause(t.Context())
	calls.Store(0)
	s.intercept(func(string, string) int {
		if calls.Add(1) == 2 {
			cancel(nil)
		}
		return http.StatusForbidden
	})
	_, err = kube.EnsureCA(ctx, api, api, nil)
	require.ErrorIs(t, err, trivet.ErrUnavailable)
}

func TestLoadAuthority(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	dir := t.TempDir()
	require.NoError(t, pki.WriteCA(dir, ca))
	a, err := kube.LoadAuthority(dir)
	require.NoError(t, err)
	assert.Equal(t, ca.CertPEM(), a.BundlePEM)
	_, err = kube.LoadAuthority(t.TempDir())
	require.ErrorIs(t, err, trivet.ErrNotFound)
}

// TestExistingCA: the CA of somebody else is waited for, and none is made; it may be in the form of cert-manager.
func TestExistingCA(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	api := s.client()
	_, err := kube.EnsureCA(within(t, 300*time.Millisecond), kube.OnlyExisting(api), api, nil)
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	require.Nil(t, s.secret())
	require.Nil(t, s.data())

	ca := newCA(t)
	key, err := ca.KeyPEM()
	require.NoError(t, err)
	s.setSecret(map[string][]byte{"tls.crt": ca.CertPEM(), "tls.key": key, kube.KeyCACert: ca.CertPEM()})
	a, err := kube.EnsureCA(within(t, time.Minute), kube.OnlyExisting(api), api, nil)
	require.NoError(t, err)
	assert.Equal(t, ca.Cluster(), a.CA.Cluster())
	assert.Equal(t, string(ca.CertPEM()), s.data()[kube.KeyCACert])
}
