package kube_test

import (
	"context"
	"crypto/tls"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authv1 "k8s.io/api/authentication/v1"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
	"github.com/trivet-csi/trivet/internal/pki"
)

// enrollment is a node and an issuer, which asks a real client's API server.
type enrollment struct {
	api *apiServer
	ca  *pki.CA
	cfg kube.EnrollConfig
	log *lockedBuffer
}

func newEnrollment(t *testing.T) *enrollment {
	t.Helper()
	e := &enrollment{api: newAPIServer(t), ca: newCA(t), log: &lockedBuffer{}}
	e.api.tokens[nodeToken] = podOn("n1")
	address, _ := serve(t, newIssuer(t, e.ca, e.api.client(), nil))
	dir := t.TempDir()
	e.cfg = kube.EnrollConfig{
		Issuer: "https://" + address, CAFile: filepath.Join(dir, "ca.crt"), TokenFile: filepath.Join(dir, "token"),
		Node: "n1", Dir: filepath.Join(dir, "certs"), Logger: e.log.logger(),
	}
	mustWrite(t, e.cfg.CAFile, e.ca.CertPEM())
	mustWrite(t, e.cfg.TokenFile, []byte(nodeToken+"\n"))
	return e
}

func mustWrite(t *testing.T, path string, b []byte) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, b, 0o600))
}

func (e *enrollment) issue(t *testing.T, ca *pki.CA, node string, v pki.Validity) *pki.Pair {
	t.Helper()
	p, err := ca.Issue(pki.Identity{Cluster: ca.Cluster(), Role: pki.RoleNode, Name: node}, v)
	require.NoError(t, err)
	return p
}

// held returns the certificate in the directory, which must be usable.
func (e *enrollment) held(t *testing.T) *pki.Pair {
	t.Helper()
	p, err := pki.ReadPair(e.cfg.Dir, pki.RoleNode)
	require.NoError(t, err)
	bundle, err := pki.ReadBundle(e.cfg.Dir)
	require.NoError(t, err)
	require.NoError(t, p.Verify(bundle))
	return p
}

func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	files := map[string]string{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		require.NoError(t, err)
		files[e.Name()] = string(b)
	}
	return files
}

func TestEnroll(t *testing.T) {
	t.Parallel()
	e := newEnrollment(t)
	require.NoError(t, kube.Enroll(within(t, time.Minute), e.cfg))
	assert.Equal(t, "n1", e.held(t).Identity.Name)
	_, err := pki.Open(e.cfg.Dir, pki.RoleNode, nil)
	require.NoError(t, err)
	assert.Len(t, e.api.reviews, 1)
	assert.NotContains(t, e.log.String(), nodeToken)

	// Again: nothing to do, and nobody is asked. So too without an issuer or a token.
	before := contents(t, e.cfg.Dir)
	require.NoError(t, os.Remove(e.cfg.TokenFile))
	require.NoError(t, kube.Enroll(within(t, time.Minute), e.cfg))
	assert.Len(t, e.api.reviews, 1)
	assert.Equal(t, before, contents(t, e.cfg.Dir))
}

// What an operator made with the same CA stays until it ages; what cannot be used is replaced.
func TestEnrollAndWhatIsThere(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for _, tt := range []struct {
		name     string
		validity pki.Validity
		spoil    func(t *testing.T, e *enrollment)
		stays    bool
	}{
		{"fresh", pki.For(time.Hour), nil, true},
		{"half its time over", pki.Validity{From: now.Add(-time.Hour), Until: now.Add(time.Hour)}, nil, true},
		{"a third left", pki.Validity{From: now.Add(-2 * time.Hour), Until: now.Add(time.Hour)}, nil, false},
		{"expired", pki.Validity{From: now.Add(-2 * time.Hour), Until: now.Add(-time.Hour)}, nil, false},
		{"key of a renewal that was cut off", pki.For(time.Hour), func(t *testing.T, e *enrollment) {
			t.Helper()
			mustWrite(t, filepath.Join(e.cfg.Dir, "node.key"), e.issue(t, e.ca, "n1", pki.For(time.Hour)).KeyPEM)
		}, false},
		{"a first try that was cut off", pki.For(time.Hour), func(t *testing.T, e *enrollment) {
			t.Helper()
			require.NoError(t, os.Remove(filepath.Join(e.cfg.Dir, "node.crt")))
		}, false},
		{"ca.crt is missing", pki.For(time.Hour), func(t *testing.T, e *enrollment) {
			t.Helper()
			require.NoError(t, os.Remove(filepath.Join(e.cfg.Dir, "ca.crt")))
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e := newEnrollment(t)
			p := e.issue(t, e.ca, "n1", tt.validity)
			require.NoError(t, pki.Write(e.cfg.Dir, e.ca.CertPEM(), p))
			if tt.spoil != nil {
				tt.spoil(t, e)
			}
			require.NoError(t, kube.Enroll(within(t, time.Minute), e.cfg))
			assert.Equal(t, tt.stays, string(p.CertPEM) == string(e.held(t).CertPEM))
		})
	}
}

// A directory of another cluster or node is an operator's mistake: nothing in it is touched.
func TestEnrollRefusesTheDirectory(t *testing.T) {
	t.Parallel()
	e := newEnrollment(t)
	other := newCA(t)
	for name, tt := range map[string]struct {
		files map[string][]byte
		want  []string
	}{
		"other node": {
			map[string][]byte{"ca.crt": e.ca.CertPEM(), "node.crt": e.issue(t, e.ca, "n2", pki.For(time.Hour)).CertPEM},
			[]string{"node n2", "node n1"},
		},
		"other cluster": {
			map[string][]byte{"ca.crt": other.CertPEM(), "node.crt": e.issue(t, other, "n1", pki.For(time.Hour)).CertPEM},
			[]string{string(other.Cluster()), string(e.ca.Cluster())},
		},
		"certificate of another cluster alone": {
			map[string][]byte{"node.crt": e.issue(t, other, "n1", pki.For(time.Hour)).CertPEM},
			[]string{string(other.Cluster()), string(e.ca.Cluster())},
		},
		"ca of another cluster alone": {
			map[string][]byte{"ca.crt": other.CertPEM()}, []string{string(other.Cluster()), string(e.ca.Cluster())},
		},
		"expired of another node": {
			map[string][]byte{"node.crt": e.issue(t, e.ca, "n2", pki.Validity{
				From: time.Now().Add(-2 * time.Hour), Until: time.Now().Add(-time.Hour),
			}).CertPEM},
			[]string{"node n2", "node n1"},
		},
		"garbage": {map[string][]byte{"node.crt": []byte("x")}, []string{"node.crt"}},
	} {
		cfg := e.cfg
		cfg.Dir = t.TempDir()
		for file, b := range tt.files {
			mustWrite(t, filepath.Join(cfg.Dir, file), b)
		}
		before := contents(t, cfg.Dir)
		err := kube.Enroll(within(t, time.Minute), cfg)
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
		for _, word := range append(tt.want, cfg.Dir) {
			require.ErrorContains(t, err, word, name)
		}
		assert.Equal(t, before, contents(t, cfg.Dir), name)
	}
	assert.Empty(t, e.api.reviews, "no token was shown to anybody")
}

// What is not there yet is waited for, with one line for each reason; a token is read anew for each try.
func TestEnrollWaits(t *testing.T) {
	t.Parallel()
	e := newEnrollment(t)
	mustWrite(t, e.cfg.TokenFile, []byte("an expired one"))
	var tries atomic.Int32
	e.api.intercept(func(string, string) int {
		switch tries.Add(1) {
		case 1, 2:
			return http.StatusForbidden
		case 4:
			mustWrite(t, e.cfg.TokenFile, []byte(nodeToken)) // this try fails with the old one
		}
		return 0
	})
	require.NoError(t, kube.Enroll(within(t, time.Minute), e.cfg))
	assert.Equal(t, int32(5), tries.Load())
	waits := strings.Count(e.log.String(), "msg=waiting")
	assert.Equal(t, 2, waits, e.log.String())
	assert.Contains(t, e.log.String(), "answered 503")
	assert.Contains(t, e.log.String(), "answered 401")
	assert.NotContains(t, e.log.String(), "expired one")
}

// It gives up when its time is over, whatever it waited for.
func TestEnrollGivesUp(t *testing.T) {
	t.Parallel()
	e := newEnrollment(t)
	for name, change := range map[string]func(*kube.EnrollConfig){
		"no ca":     func(c *kube.EnrollConfig) { c.CAFile += ".missing" },
		"no token":  func(c *kube.EnrollConfig) { c.TokenFile += ".missing" },
		"no issuer": func(c *kube.EnrollConfig) { c.Issuer = "https://127.0.0.1:1" },
	} {
		cfg := e.cfg
		change(&cfg)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		err := kube.Enroll(ctx, cfg)
		cancel()
		require.ErrorIs(t, err, trivet.ErrUnavailable, name)
		assert.NoDirExists(t, cfg.Dir)
	}
}

// Who gives up in the middle of a try says why none before it worked, not that this one was cut off.
func TestEnrollSaysWhyItGaveUp(t *testing.T) {
	t.Parallel()
	e := newEnrollment(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	leave := make(chan struct{})
	defer close(leave)
	var tries atomic.Int32
	e.api.intercept(func(string, string) int {
		if tries.Add(1) > 1 {
			cancel()
			<-leave
		}
		return http.StatusForbidden
	})
	err := kube.Enroll(ctx, e.cfg)
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	require.ErrorContains(t, err, "answered 503")
}

// What waiting does not mend is an error at once.
func TestEnrollFails(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		change func(t *testing.T, e *enrollment)
		want   string
	}{
		"other account": {func(_ *testing.T, e *enrollment) {
			e.api.tokens[nodeToken] = with(podOn("n1"), func(st *authv1.TokenReviewStatus) { st.User.Username = "someone" })
		}, `only \"` + nodeAccount},
		"runs on another node": {func(_ *testing.T, e *enrollment) {
			e.api.tokens[nodeToken] = podOn("n2")
		}, "give that --node"},
		"bad ca": {func(t *testing.T, e *enrollment) {
			t.Helper()
			mustWrite(t, e.cfg.CAFile, []byte("x"))
		}, "ca.crt"},
		"bad issuer": {func(_ *testing.T, e *enrollment) { e.cfg.Issuer = "http://x" }, "https://"},
		"bad node":   {func(_ *testing.T, e *enrollment) { e.cfg.Node = "N1" }, "N1"},
		"no dir":     {func(_ *testing.T, e *enrollment) { e.cfg.Dir = "" }, "dir"},
	} {
		e := newEnrollment(t)
		tt.change(t, e)
		err := kube.Enroll(within(t, time.Minute), e.cfg)
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
		require.ErrorContains(t, err, tt.want, name)
		if e.cfg.Dir != "" {
			assert.NoDirExists(t, e.cfg.Dir, name)
		}
	}
}

// The token goes to an issuer of the cluster and to nobody else.
func TestEnrollKeepsItsToken(t *testing.T) {
	t.Parallel()
	e := newEnrollment(t)
	var heard atomic.Int32
	listen := func(ca *pki.CA, h http.HandlerFunc) string {
		cfg, err := ca.IssuerServerConfig("issuer", time.Hour, "http/1.1")
		require.NoError(t, err)
		server := httptest.NewUnstartedServer(h)
		address := server.Listener.Addr().String()
		server.Listener = tls.NewListener(server.Listener, cfg) // StartTLS would put its own certificate first
		server.Start()
		t.Cleanup(server.Close)
		return "https://" + address
	}
	enroll := func(issuer, reason string) error { // until that reason to wait is told
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		cfg := e.cfg
		cfg.Issuer = issuer
		ended := make(chan error, 1)
		go func() { ended <- kube.Enroll(ctx, cfg) }()
		require.Eventually(t, func() bool { return strings.Contains(e.log.String(), reason) }, time.Minute, time.Millisecond)
		cancel()
		return <-ended
	}
	stranger := listen(newCA(t), func(http.ResponseWriter, *http.Request) { heard.Add(1) })
	err := enroll(stranger, "is of cluster")
	require.ErrorIs(t, err, trivet.ErrUnavailable, "it may have the address of one that is gone")
	require.ErrorContains(t, err, "is of cluster")
	assert.Zero(t, heard.Load())

	// Nor is a redirection followed.
	err = enroll(listen(e.ca, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, e.cfg.Issuer+"/v1/certificate", http.StatusTemporaryRedirect)
	}), "answered 307")
	require.ErrorContains(t, err, "answered 307")
	assert.Empty(t, e.api.reviews)
}

// A running KeepEnrolled renews in time, follows the CAs, and outlives a time without issuer.
func TestKeepEnrolled(t *testing.T) {
	t.Parallel()
	e := newEnrollment(t)
	e.cfg.CheckEvery = 5 * time.Millisecond
	require.NoError(t, kube.Enroll(within(t, time.Minute), e.cfg))
	server, err := pki.Open(e.cfg.Dir, pki.RoleNode, nil) // as the server's, which must take the changes up
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		kube.KeepEnrolled(ctx, e.cfg)
	}()

	e.api.intercept(func(string, string) int { return http.StatusForbidden })
	now := time.Now()
	require.NoError(t, pki.Renew(e.cfg.Dir, e.issue(t, e.ca, "n1",
		pki.Validity{From: now.Add(-time.Hour), Until: now.Add(10 * time.Minute)})))
	require.Eventually(t, func() bool { return strings.Contains(e.log.String(), "cannot keep the certificate good") },
		time.Minute, time.Millisecond)
	e.api.intercept(nil)
	require.Eventually(t, func() bool { return time.Until(server.Expires()) > 30*time.Minute }, time.Minute,
		time.Millisecond)

	next, err := pki.NewCA(e.ca.Cluster(), pki.For(pki.CAValidity))
	require.NoError(t, err)
	both := append(e.ca.CertPEM(), next.CertPEM()...)
	mustWrite(t, e.cfg.CAFile+".new", both)
	require.NoError(t, os.Rename(e.cfg.CAFile+".new", e.cfg.CAFile))
	require.Eventually(t, func() bool {
		b, err := pki.ReadBundle(e.cfg.Dir)
		return err == nil && string(b) == string(both)
	}, time.Minute, time.Millisecond)
	e.held(t)
	cancel()
	<-ended
	assert.Equal(t, 1, strings.Count(e.log.String(), "cannot keep the certificate good"), "one line for each reason")
}

func TestClientCertificate(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	cfg := kube.ClientConfig{
		Authority: &kube.Authority{CA: ca, BundlePEM: ca.CertPEM()}, Name: "csi-controller",
		Dir: filepath.Join(t.TempDir(), "certs"), Validity: time.Hour,
	}
	require.NoError(t, kube.WriteClient(cfg))
	creds, err := pki.Open(cfg.Dir, pki.RoleClient, nil)
	require.NoError(t, err)
	assert.Equal(t, "csi-controller", creds.Identity().Name)
	assert.WithinDuration(t, time.Now().Add(time.Hour), creds.Expires(), time.Minute)
	require.NoError(t, kube.WriteClient(cfg), "a restart")
	other := cfg
	other.Name = "else"
	require.ErrorIs(t, kube.WriteClient(other), trivet.ErrInvalid)

	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		kube.KeepClient(ctx, cfg, time.Millisecond)
	}()
	now := time.Now()
	old, err := ca.Issue(creds.Identity(), pki.Validity{From: now.Add(-time.Hour), Until: now.Add(10 * time.Minute)})
	require.NoError(t, err)
	require.NoError(t, pki.Renew(cfg.Dir, old))
	require.Eventually(t, func() bool { return time.Until(creds.Expires()) > 30*time.Minute }, time.Minute,
		time.Millisecond)
	require.NoError(t, os.Remove(filepath.Join(cfg.Dir, "client.crt")))
	require.Eventually(t, func() bool {
		_, err := os.Stat(filepath.Join(cfg.Dir, "client.crt"))
		return err == nil
	}, time.Minute, time.Millisecond)
	cancel()
	<-ended
}
