package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	authv1 "k8s.io/api/authentication/v1"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
)

// Paths of an issuer.
const (
	pathCertificate = "/v1/certificate" // POST: a request for a certificate, answered with the certificate
	pathPlace       = "/v1/place"       // GET: where the node of the token stands, as a Place in JSON
	pathHealth      = "/healthz"        // GET: 200, for probes
)

// nodeNameExtra is the claim of a pod's token that says on which node the pod runs. The API server puts
// it there, and in the answer to a TokenReview, since Kubernetes 1.32 (KEP-4193).
const nodeNameExtra = "authentication.kubernetes.io/node-name"

// Limits of an issuer. The slowest part of a request is the API server's answer.
const (
	issuerName = "issuer"
	alpnHTTP   = "http/1.1"

	signingMax       = 16 // requests that are reviewed and signed at once; more are told to come again
	headerBytesMax   = 16 << 10
	readTimeout      = 10 * time.Second
	writeTimeout     = 30 * time.Second // covers the review of a token, see apiTimeout
	idleTimeout      = 30 * time.Second
	shutdownTimeout  = 5 * time.Second
	retryAfterSecond = "2"
)

// Reviewer asks the API server whose a token is. *API is one.
type Reviewer interface {
	ReviewToken(ctx context.Context, token, audience string) (*authv1.TokenReviewStatus, error)
}

// IssuerConfig is what an Issuer needs.
type IssuerConfig struct {
	CA       *pki.CA
	Reviewer Reviewer

	// NodeAccount is the user name of the nodes' pods: system:serviceaccount:NAMESPACE:NAME.
	NodeAccount string

	// Validity of the certificates; 0 is pki.LeafValidity. The CA's end is theirs too.
	Validity time.Duration

	// Labels say what a node is told of its place; the issuer reads them from Nodes. Both may be empty.
	Labels PlaceLabels
	Nodes  NodeReader

	Logger *slog.Logger // nil discards
}

// Issuer hands out certificates to nodes. Whoever sends a request for one, with a token in the
// Authorization header, gets a certificate of the node that the token's pod runs on, as the API server
// says, for the key in the request; nothing else that is sent counts. It answers 401 for a token that is
// nobody's or of another audience, 403 for one of another account or without a node, 400 for a malformed
// request and 503 while the API server cannot be asked; the body says why, in one line. It is an
// http.Handler, to be served by Serve.
type Issuer struct {
	cfg     IssuerConfig
	log     *slog.Logger
	mux     *http.ServeMux
	signing chan struct{}
}

// NewIssuer returns an Issuer. It returns ErrInvalid for a configuration that could sign nothing.
func NewIssuer(cfg IssuerConfig) (*Issuer, error) {
	if !strings.HasPrefix(cfg.NodeAccount, "system:serviceaccount:") || strings.Count(cfg.NodeAccount, ":") != 3 {
		return nil, fmt.Errorf("node account %q: want system:serviceaccount:NAMESPACE:NAME: %w", cfg.NodeAccount,
			trivet.ErrInvalid)
	}
	if cfg.Validity == 0 {
		cfg.Validity = pki.LeafValidity
	}
	if err := cfg.Labels.Validate(); err != nil {
		return nil, err
	}
	if cfg.Validity < 0 {
		return nil, fmt.Errorf("validity %s: want more than zero: %w", cfg.Validity, trivet.ErrInvalid)
	}
	i := &Issuer{
		cfg: cfg, log: orDiscard(cfg.Logger), mux: http.NewServeMux(), signing: make(chan struct{}, signingMax),
	}
	i.mux.HandleFunc("POST "+pathCertificate, i.serveCertificate)
	i.mux.HandleFunc("GET "+pathPlace, i.servePlace)
	i.mux.HandleFunc("GET "+pathHealth, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	return i, nil
}

// ServeHTTP implements http.Handler.
func (i *Issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) { i.mux.ServeHTTP(w, r) }

// Serve serves on a listener, which it closes, with a certificate that the CA gives it, until ctx ends.
// It returns nil then, once the requests under way are answered.
func (i *Issuer) Serve(ctx context.Context, l net.Listener) error {
	cfg, err := i.cfg.CA.IssuerServerConfig(issuerName, i.cfg.Validity, alpnHTTP)
	if err != nil {
		return errors.Join(fmt.Errorf("serve the issuer: %w", err), l.Close())
	}
	s := &http.Server{
		Handler: i, TLSConfig: cfg, MaxHeaderBytes: headerBytesMax,
		ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		ErrorLog: slog.NewLogLogger(i.log.Handler(), slog.LevelDebug), // handshakes of strangers and probes
	}
	stopped := make(chan struct{})
	running := context.AfterFunc(ctx, func() {
		defer close(stopped)
		within, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if s.Shutdown(within) != nil { // somebody is slow: it ends all the same
			_ = s.Close() // reports listeners, which are closed already
		}
	})
	err = s.ServeTLS(l, "", "")
	if running() {
		return fmt.Errorf("serve the issuer: %w", err)
	}
	<-stopped
	return nil
}

// refusal is an answer other than a certificate. Its text goes to the client.
type refusal struct {
	code int
	text string
}

// Error implements error.
func (r *refusal) Error() string { return r.text }

func refuse(code int, format string, args ...any) *refusal {
	return &refusal{code: code, text: fmt.Sprintf(format, args...)}
}

func (i *Issuer) serveCertificate(w http.ResponseWriter, r *http.Request) {
	certPEM, err := i.answer(w, r)
	if err == nil {
		w.Header().Set("Content-Type", "application/x-pem-file")
		_, _ = w.Write(certPEM) // an error is a client that is gone; it comes again
		return
	}
	i.refused(w, r, err)
}

// refused answers with what is wrong.
func (i *Issuer) refused(w http.ResponseWriter, r *http.Request, err error) {
	var no *refusal
	if !errors.As(err, &no) {
		i.log.Error("cannot issue certificates", "err", err)
		no = refuse(http.StatusInternalServerError, "the issuer cannot sign; its log says why")
	}
	if no.code == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", retryAfterSecond)
	}
	i.log.Warn("refused a request", "path", r.URL.Path, "remote", r.RemoteAddr, "code", no.code, "err", no.text)
	http.Error(w, no.text, no.code)
}

// answer returns the certificate for a request, or a *refusal.
func (i *Issuer) answer(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	token, err := bearer(r)
	if err != nil {
		return nil, err
	}
	// Read before taking a slot: a slow sender must not hold one.
	csr, err := io.ReadAll(http.MaxBytesReader(w, r.Body, pki.RequestBytesMax))
	if err != nil {
		return nil, refuse(http.StatusBadRequest, "read the request: %v (at most %d bytes)", err, pki.RequestBytesMax)
	}
	release, err := i.enter()
	if err != nil {
		return nil, err
	}
	defer release()
	node, err := i.nodeOf(r.Context(), token)
	if err != nil {
		return nil, err
	}
	return i.sign(csr, node)
}

// bearer returns the token of a request.
func bearer(r *http.Request) (string, error) {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || token == "" {
		return "", refuse(http.StatusUnauthorized, "no token: send Authorization: Bearer TOKEN")
	}
	return token, nil
}

// enter takes one of the slots for requests about which the API server is asked.
func (i *Issuer) enter() (release func(), err error) {
	select {
	case i.signing <- struct{}{}:
		return func() { <-i.signing }, nil
	default:
		return nil, refuse(http.StatusServiceUnavailable, "busy with %d requests, come again", signingMax)
	}
}

// nodeOf returns the node that the pod with a token runs on.
func (i *Issuer) nodeOf(ctx context.Context, token string) (trivet.NodeID, error) {
	st, err := i.cfg.Reviewer.ReviewToken(ctx, token, Audience)
	switch {
	case err != nil:
		// Never to the client: it is not known who that is.
		i.log.Warn("cannot ask the API server whose a token is", "err", err)
		return "", refuse(http.StatusServiceUnavailable, "cannot ask the API server whose the token is, come again")
	case !st.Authenticated:
		return "", refuse(http.StatusUnauthorized, "the API server does not accept the token for audience %s", Audience)
	case !slices.Contains(st.Audiences, Audience):
		return "", refuse(http.StatusUnauthorized, "the token is not for audience %s", Audience)
	case st.User.Username != i.cfg.NodeAccount:
		return "", refuse(http.StatusForbidden, "the token is of %q, only %q gets certificates", st.User.Username,
			i.cfg.NodeAccount)
	}
	names := st.User.Extra[nodeNameExtra]
	if len(names) != 1 {
		return "", refuse(http.StatusForbidden, "the token names %d nodes, want one: it must be a pod's, of Kubernetes 1.32 "+
			"or later", len(names))
	}
	if err := trivet.ValidateNodeID(names[0]); err != nil {
		return "", refuse(http.StatusForbidden, "the token's node: %v", err)
	}
	return trivet.NodeID(names[0]), nil
}

// sign makes the certificate of a node.
func (i *Issuer) sign(csr []byte, node trivet.NodeID) ([]byte, error) {
	ca := i.cfg.CA
	id := pki.Identity{Cluster: ca.Cluster(), Role: pki.RoleNode, Name: string(node)}
	if err := pki.CheckRequest(csr); err != nil {
		return nil, refuse(http.StatusBadRequest, "%v", err)
	}
	certPEM, err := ca.Sign(csr, id, ca.Within(pki.For(i.cfg.Validity)))
	if err != nil {
		return nil, err
	}
	info, err := pki.Inspect(certPEM)
	if err != nil {
		return nil, err
	}
	i.log.Info("issued a certificate", "node", string(node), "serial", info.Serial, "until", info.Until)
	return certPEM, nil
}
