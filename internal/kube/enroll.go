package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
)

const (
	enrollTimeout  = 35 * time.Second // of one try; longer than the issuer's own
	answerBytesMax = 64 << 10
	checkEvery     = time.Minute
	reasonBytesMax = 512
)

// EnrollConfig says which node is to have a certificate, where, and from whom.
type EnrollConfig struct {
	Issuer    string // https://host:port
	CAFile    string // the CAs of the cluster, as the ConfigMap shows them; they are trusted
	TokenFile string // the pod's token for Audience; read anew each time, for kubelet replaces it
	Node      trivet.NodeID
	Dir       string // gets ca.crt, node.crt and node.key

	// CheckEvery is how often KeepEnrolled looks at the files; 0 is a minute. A certificate is renewed
	// no more often than that.
	CheckEvery time.Duration

	Logger *slog.Logger // nil discards
}

// Validate returns ErrInvalid for a configuration that cannot work, and names the field.
func (c EnrollConfig) Validate() error {
	u, err := url.Parse(c.Issuer)
	if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" {
		return fmt.Errorf("issuer %q: want https://HOST:PORT: %w", c.Issuer, trivet.ErrInvalid)
	}
	for _, f := range []struct{ name, value string }{{"ca", c.CAFile}, {"token", c.TokenFile}, {"dir", c.Dir}} {
		if f.value == "" {
			return fmt.Errorf("%s: is empty: %w", f.name, trivet.ErrInvalid)
		}
	}
	return trivet.ValidateNodeID(string(c.Node))
}

// Enroll returns once Dir holds a certificate of Node that more than a third of its validity is left of.
// One that is there already, by whomever it was made, is left alone; otherwise a key is made here and the
// issuer asked to certify it, until it does or ctx ends: ErrUnavailable. What cannot get better by waiting
// is ErrInvalid: a directory of another cluster or node, in which nothing is changed, an issuer that
// refuses this pod, and an answer that is not the certificate that was asked for.
func Enroll(ctx context.Context, cfg EnrollConfig) error {
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("enroll: %w", err)
	}
	e := &enroller{cfg: cfg, log: orDiscard(cfg.Logger)}
	w := &waiter{log: e.log, what: "a certificate"}
	for {
		err := e.once(ctx)
		if err == nil {
			return nil
		}
		if errors.Is(err, trivet.ErrInvalid) {
			return fmt.Errorf("enroll node %s: %w", cfg.Node, err)
		}
		if more, why := w.again(ctx, err); !more {
			return fmt.Errorf("enroll node %s: gave up: %w", cfg.Node, unavailable(why))
		}
	}
}

// KeepEnrolled keeps what Enroll made good until ctx ends: it renews the certificate when a third of its
// validity is left, and follows changes of CAFile. What goes wrong is logged, once for each reason, and
// tried again. REQUIRES: Enroll has returned nil for the same configuration.
func KeepEnrolled(ctx context.Context, cfg EnrollConfig) {
	e := &enroller{cfg: cfg, log: orDiscard(cfg.Logger)}
	pause := cfg.CheckEvery
	if pause <= 0 {
		pause = checkEvery
	}
	repeat(ctx, pause, func() error { return e.once(ctx) }, func(err error) {
		e.log.Warn("cannot keep the certificate good", "dir", cfg.Dir, "err", err)
	})
}

// enroller gets certificates.
type enroller struct {
	cfg EnrollConfig
	log *slog.Logger
}

// once makes one try.
func (e *enroller) once(ctx context.Context) error {
	bundle, err := os.ReadFile(e.cfg.CAFile)
	if err != nil {
		return fmt.Errorf("read the cluster's ca: %w", err)
	}
	cluster, err := pki.BundleCluster(bundle)
	if err != nil {
		return fmt.Errorf("read the cluster's ca: %s: %w", e.cfg.CAFile, err)
	}
	id := pki.Identity{Cluster: cluster, Role: pki.RoleNode, Name: string(e.cfg.Node)}
	old, err := e.held(id)
	if err != nil {
		return err
	}
	if old != nil && old.Verify(bundle) == nil {
		info, err := pki.Inspect(old.CertPEM)
		if err != nil {
			return err
		}
		if time.Now().Before(info.RenewAt()) {
			return e.follow(bundle, old)
		}
	}
	p, err := e.request(ctx, bundle, id)
	if err != nil {
		return err
	}
	if err := pki.Install(e.cfg.Dir, bundle, p); err != nil {
		return err
	}
	info, err := pki.Inspect(p.CertPEM)
	if err != nil {
		return err
	}
	e.log.Info("got a certificate", "node", id.Name, "cluster", string(cluster), "serial", info.Serial,
		"until", info.Until, "dir", e.cfg.Dir)
	return nil
}

// held returns the certificate in the directory, nil when there is none. It returns ErrInvalid when the
// directory is of another cluster or node.
func (e *enroller) held(id pki.Identity) (*pki.Pair, error) {
	bundle, err := pki.ReadBundle(e.cfg.Dir)
	if err == nil {
		cluster, err := pki.BundleCluster(bundle)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(e.cfg.Dir, KeyCACert), err)
		}
		if cluster != id.Cluster {
			return nil, e.wrongDir("the ca of cluster "+string(cluster), id)
		}
	} else if !errors.Is(err, trivet.ErrNotFound) {
		return nil, err
	}
	p, err := pki.ReadPair(e.cfg.Dir, pki.RoleNode)
	switch {
	case errors.Is(err, trivet.ErrNotFound):
		return nil, nil
	case err != nil:
		return nil, err
	case p.Identity != id:
		holds := fmt.Sprintf("the certificate of node %s of cluster %s", p.Identity.Name, p.Identity.Cluster)
		return nil, e.wrongDir(holds, id)
	}
	return p, nil
}

// wrongDir says that the directory holds something of another cluster or node, and what to do.
func (e *enroller) wrongDir(holds string, want pki.Identity) error {
	return fmt.Errorf("%s holds %s, want node %s of cluster %s; give the right --node and --ca, or, if nothing on this "+
		"machine is needed any more, empty that directory and the server's data: %w", e.cfg.Dir, holds, want.Name,
		want.Cluster, trivet.ErrInvalid)
}

// follow makes the directory trust what the cluster trusts now.
func (e *enroller) follow(bundle []byte, p *pki.Pair) error {
	have, err := pki.ReadBundle(e.cfg.Dir)
	if err == nil && bytes.Equal(have, bundle) {
		return nil
	}
	if err := pki.Install(e.cfg.Dir, bundle, p); err != nil {
		return err
	}
	e.log.Info("took up the cluster's ca bundle", "dir", e.cfg.Dir)
	return nil
}

// request makes a key and asks the issuer to certify it. The pair that it returns is checked by Install.
func (e *enroller) request(ctx context.Context, bundle []byte, id pki.Identity) (*pki.Pair, error) {
	keyPEM, csrPEM, err := pki.NewRequest()
	if err != nil {
		return nil, err
	}
	certPEM, err := askIssuer(ctx, e.cfg, bundle, http.MethodPost, pathCertificate, csrPEM)
	if err != nil {
		return nil, err
	}
	info, err := pki.Inspect(certPEM)
	if err != nil {
		return nil, fmt.Errorf("the issuer's answer: %w", err)
	}
	if info.Identity != id {
		return nil, fmt.Errorf("the issuer made a certificate of %s, not of %s: the pod of this token runs there, give that "+
			"--node: %w", info.Identity, id, trivet.ErrInvalid)
	}
	return &pki.Pair{Identity: id, CertPEM: certPEM, KeyPEM: keyPEM}, nil
}

// askIssuer returns the issuer's answer to a request with the pod's token. What it refuses for good is ErrInvalid.
func askIssuer(ctx context.Context, cfg EnrollConfig, bundle []byte, method, path string, body []byte,
) ([]byte, error) {
	token, err := os.ReadFile(cfg.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("read the pod's token: %w", err)
	}
	tlsConfig, err := pki.IssuerClientConfig(bundle, alpnHTTP)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{TLSClientConfig: tlsConfig, DisableKeepAlives: true} // and no proxy
	client := &http.Client{
		Transport: transport, Timeout: enrollTimeout,
		// The token is for the issuer alone, wherever that may point.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	address := strings.TrimSuffix(cfg.Issuer, "/") + path
	req, err := http.NewRequestWithContext(ctx, method, address, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	answer, err := do(client, req, token)
	if err != nil {
		return nil, fmt.Errorf("ask the issuer: %w", err)
	}
	return answer, nil
}

func do(client *http.Client, req *http.Request, token []byte) ([]byte, error) {
	req.Header.Set("Authorization", "Bearer "+string(bytes.TrimSpace(token)))
	resp, err := client.Do(req)
	if err != nil {
		// Also a far end that is no issuer: an address may have had another owner a moment ago.
		return nil, fmt.Errorf("%v: %w", err, trivet.ErrUnavailable)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, answerBytesMax))
	if err != nil {
		return nil, fmt.Errorf("read its answer: %w", err)
	}
	if resp.StatusCode == http.StatusOK {
		return body, nil
	}
	reason, _, _ := strings.Cut(strings.TrimSpace(string(body[:min(len(body), reasonBytesMax)])), "\n")
	kind := trivet.ErrUnavailable // 401 too: kubelet replaces the token
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed:
		kind = trivet.ErrInvalid
	}
	return nil, fmt.Errorf("it answered %s: %q: %w", resp.Status, reason, kind)
}
