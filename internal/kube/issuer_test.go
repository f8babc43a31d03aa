package kube_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authv1 "k8s.io/api/authentication/v1"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
	"github.com/trivet-csi/trivet/internal/pki"
)

const (
	nodeAccount = "system:serviceaccount:" + namespace + ":trivet-node"
	nodeToken   = "token-of-a-pod-on-n1"
	nodeExtra   = "authentication.kubernetes.io/node-name"
)

// podOn is the answer to the review of the token of a node's pod.
func podOn(nodes ...string) authv1.TokenReviewStatus {
	return authv1.TokenReviewStatus{
		Authenticated: true, Audiences: []string{kube.Audience},
		User: authv1.UserInfo{Username: nodeAccount, Extra: map[string]authv1.ExtraValue{nodeExtra: nodes}},
	}
}

func with(st authv1.TokenReviewStatus, change func(*authv1.TokenReviewStatus)) authv1.TokenReviewStatus {
	change(&st)
	return st
}

// lockedBuffer is a log that a test reads while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lockedBuffer) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func newIssuer(t *testing.T, ca *pki.CA, r kube.Reviewer, log *slog.Logger) *kube.Issuer {
	t.Helper()
	i, err := kube.NewIssuer(kube.IssuerConfig{
		CA: ca, Reviewer: r, NodeAccount: nodeAccount, Validity: time.Hour, Logger: log,
	})
	require.NoError(t, err)
	return i
}

// post sends a request to the handler and returns what it answers.
func post(t *testing.T, h http.Handler, token string, body io.Reader, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/certificate", body)
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func request(t *testing.T) (keyPEM, csrPEM []byte) {
	t.Helper()
	keyPEM, csrPEM, err := pki.NewRequest()
	require.NoError(t, err)
	return keyPEM, csrPEM
}

// A pod gets a certificate of the node it runs on, whatever else it asks for.
func TestIssuer(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	s.tokens[nodeToken] = podOn("n1")
	ca := newCA(t)
	var log lockedBuffer
	i := newIssuer(t, ca, s.client(), log.logger())
	keyPEM, csrPEM := request(t)
	w := post(t, i, nodeToken, bytes.NewReader(csrPEM), "X-Node", "n2", "Node", "n2")
	require.Equal(t, http.StatusOK, w.Code, w.Body)
	p := &pki.Pair{
		Identity: pki.Identity{Cluster: ca.Cluster(), Role: pki.RoleNode, Name: "n1"},
		CertPEM:  w.Body.Bytes(), KeyPEM: keyPEM,
	}
	require.NoError(t, p.Verify(ca.CertPEM()))
	info, err := pki.Inspect(p.CertPEM)
	require.NoError(t, err)
	assert.WithinDuration(t, time.Now().Add(time.Hour), info.Until, time.Minute)
	assert.Equal(t, []authv1.TokenReviewSpec{{Token: nodeToken, Audiences: []string{kube.Audience}}}, s.reviews)
	assert.Contains(t, log.String(), "level=INFO msg=\"issued a certificate\" node=n1 serial="+info.Serial+" until=")
	assert.NotContains(t, log.String(), nodeToken)
}

func TestIssuerRefuses(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	_, csr := request(t)
	for _, tt := range []struct {
		name   string
		token  string
		review authv1.TokenReviewStatus
		body   []byte
		code   int
		want   string
	}{
		{"no token", "", podOn("n1"), csr, http.StatusUnauthorized, "no token"},
		{
			"token of nobody", "t",
			authv1.TokenReviewStatus{Error: "expired"},
			csr, http.StatusUnauthorized,
			"does not accept",
		},
		{
			"not authenticated, all else right", "t",
			with(podOn("n1"), func(st *authv1.TokenReviewStatus) { st.Authenticated = false }), csr,
			http.StatusUnauthorized, "does not accept",
		},
		{
			"other audience", "t",
			with(podOn("n1"), func(st *authv1.TokenReviewStatus) { st.Audiences = []string{"https://kubernetes.default"} }),
			csr, http.StatusUnauthorized, "audience",
		},
		{
			"api server without audiences", "t",
			with(podOn("n1"), func(st *authv1.TokenReviewStatus) { st.Audiences = nil }), csr,
			http.StatusUnauthorized, "audience",
		},
		{
			"other account", "t",
			with(podOn("n1"), func(st *authv1.TokenReviewStatus) {
				st.User.Username = "system:serviceaccount:default:trivet-node"
			}),
			csr, http.StatusForbidden, "system:serviceaccount:default:trivet-node",
		},
		{
			"a node itself", "t",
			with(podOn("n1"), func(st *authv1.TokenReviewStatus) { st.User.Username = "system:node:n1" }),
			csr, http.StatusForbidden, "system:node:n1",
		},
		{"no node", "t", podOn(), csr, http.StatusForbidden, "names 0 nodes"},
		{"two nodes", "t", podOn("n1", "n2"), csr, http.StatusForbidden, "names 2 nodes"},
		{"no node's name", "t", podOn("../n1"), csr, http.StatusForbidden, "node name"},
		{"empty node", "t", podOn(""), csr, http.StatusForbidden, "node name"},
		{"no request", "t", podOn("n1"), nil, http.StatusBadRequest, "PEM"},
		{"garbage", "t", podOn("n1"), []byte("hello"), http.StatusBadRequest, "PEM"},
		{
			"too large", "t", podOn("n1"), bytes.Repeat([]byte("x"), pki.RequestBytesMax+1), http.StatusBadRequest,
			"at most 16384 bytes",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.mu.Lock()
			s.tokens["t"] = tt.review
			s.mu.Unlock()
			var log lockedBuffer
			w := post(t, newIssuer(t, newCA(t), s.client(), log.logger()), tt.token, bytes.NewReader(tt.body))
			assert.Equal(t, tt.code, w.Code)
			assert.Contains(t, w.Body.String(), tt.want)
			assert.NotContains(t, w.Body.String(), "CERTIFICATE-----")
			assert.Equal(t, 1, strings.Count(w.Body.String(), "\n"), "one line: %s", w.Body)
			assert.Contains(t, log.String(), "refused a request")
			assert.NotContains(t, log.String(), "issued")
		})
	}
}

// While the API server cannot be asked, nobody is anybody; and what it said is not told to strangers.
func TestIssuerWithoutAPIServer(t *testing.T) {
	t.Parallel()
	s := newAPIServer(t)
	s.intercept(func(string, string) int { return http.StatusForbidden })
	i := newIssuer(t, newCA(t), s.client(), nil)
	_, csr := request(t)
	for range 2 {
		w := post(t, i, nodeToken, bytes.NewReader(csr))
		assert.Equal(t, http.StatusServiceUnavailable, w.Code)
		assert.NotEmpty(t, w.Header().Get("Retry-After"))
		assert.NotContains(t, w.Body.String(), "forbidden")
		s.http.Close()
	}
}

// reviewFunc is a Reviewer.
type reviewFunc func(ctx context.Context, token string) (*authv1.TokenReviewStatus, error)

func (f reviewFunc) ReviewToken(ctx context.Context, token, _ string) (*authv1.TokenReviewStatus, error) {
	return f(ctx, token)
}

// The requests under way are bounded, and one more is told to come again.
func TestIssuerIsBounded(t *testing.T) {
	t.Parallel()
	const signingMax = 16
	entered, leave := make(chan struct{}), make(chan struct{})
	i := newIssuer(t, newCA(t), reviewFunc(func(context.Context, string) (*authv1.TokenReviewStatus, error) {
		entered <- struct{}{}
		<-leave
		st := podOn("n1")
		return &st, nil
	}), nil)
	_, csr := request(t)
	var wg sync.WaitGroup
	for range signingMax {
		wg.Go(func() {
			assert.Equal(t, http.StatusOK, post(t, i, nodeToken, bytes.NewReader(csr)).Code)
		})
	}
	for range signingMax {
		<-entered
	}
	w := post(t, i, nodeToken, bytes.NewReader(csr))
	assert.Equal(t, http.StatusServiceUnavailable, w.Code)
	assert.Contains(t, w.Body.String(), "busy")
	close(leave)
	wg.Wait()
	go func() { <-entered }()
	assert.Equal(t, http.StatusOK, post(t, i, nodeToken, bytes.NewReader(csr)).Code, "slots come free")
}

func TestIssuerOtherRequests(t *testing.T) {
	t.Parallel()
	i := newIssuer(t, newCA(t), newAPIServer(t).client(), nil)
	for path, want := range map[string]int{
		"/healthz": http.StatusOK, "/": http.StatusNotFound, "/v1/certificate": http.StatusMethodNotAllowed,
	} {
		w := httptest.NewRecorder()
		i.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, http.NoBody))
		assert.Equal(t, want, w.Code, path)
	}
}

func TestNewIssuerRefuses(t *testing.T) {
	t.Parallel()
	for _, account := range []string{"", "trivet-node", "system:node:n1", "system:serviceaccount:x", "a:b:c:d"} {
		_, err := kube.NewIssuer(kube.IssuerConfig{CA: newCA(t), NodeAccount: account})
		require.ErrorIs(t, err, trivet.ErrInvalid, account)
	}
	_, err := kube.NewIssuer(kube.IssuerConfig{CA: newCA(t), NodeAccount: nodeAccount, Validity: -1})
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

// serve serves an Issuer on loopback until the test or the returned function ends it.
func serve(t *testing.T, i *kube.Issuer) (address string, stop func() error) {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return l.Addr().String(), serveOn(t, i, l)
}

func serveOn(t *testing.T, i *kube.Issuer, l net.Listener) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- i.Serve(ctx, l) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	t.Cleanup(func() { require.NoError(t, stop()) })
	return stop
}

// pipes is a listener in memory, for a bubble.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (p *pipes) dial(context.Context, string, string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case p.conns <- far:
		return near, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

// Accept implements net.Listener.
func (p *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

// Addr implements net.Listener.
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "unix"} }

// Serve speaks TLS 1.3 only, answers what is under way when it stops, and then is gone. In a bubble: who is slow to
// answer is not waited for long.
func TestServe(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t)
		entered, leave := make(chan struct{}), make(chan struct{})
		slow := reviewFunc(func(context.Context, string) (*authv1.TokenReviewStatus, error) {
			close(entered)
			<-leave
			return nil, errors.New("no")
		})
		l := newPipes()
		stop := serveOn(t, newIssuer(t, ca, slow, nil), l)
		cfg, err := pki.IssuerClientConfig(ca.CertPEM(), "http/1.1")
		require.NoError(t, err)
		conn, err := l.dial(t.Context(), "", "")
		require.NoError(t, err)
		old := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
		require.ErrorContains(t, old.HandshakeContext(t.Context()), "protocol version")
		require.NoError(t, conn.Close())

		client := &http.Client{Transport: &http.Transport{
			DialContext: l.dial, TLSClientConfig: cfg, DisableKeepAlives: true,
		}}
		codes := make(chan int, 1)
		go func() {
			_, csr, err := pki.NewRequest()
			assert.NoError(t, err)
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://issuer/v1/certificate",
				bytes.NewReader(csr))
			assert.NoError(t, err)
			r.Header.Set("Authorization", "Bearer t")
			resp, err := client.Do(r)
			if !assert.NoError(t, err) {
				codes <- 0 // the test must end
				return
			}
			codes <- resp.StatusCode
			resp.Body.Close()
		}()
		<-entered
		stopped := make(chan error, 1)
		go func() { stopped <- stop() }()
		synctest.Wait()
		_, err = l.dial(t.Context(), "", "")
		require.ErrorIs(t, err, net.ErrClosed, "it listens no more")
		select {
		case <-stopped:
			t.Error("Serve returned before it answered")
			stopped <- nil
		default:
		}
		close(leave)
		assert.Equal(t, http.StatusServiceUnavailable, <-codes)
		require.NoError(t, <-stopped)
	})
}
