package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/node"
)

// detachTimeout bounds the detach after a client of ServeVolume has gone.
const detachTimeout = time.Minute

// ServeVolume implements api.AdminServer.
func (a *admin) ServeVolume(r *api.ServeVolumeRequest, stream grpc.ServerStreamingServer[api.ServeVolumeResponse],
) error {
	ctx := stream.Context()
	service, err := a.nbdService(r)
	if err != nil {
		return err
	}
	served := false
	service.Ready = func(export string, at net.Addr) error {
		served = true
		return stream.Send(&api.ServeVolumeResponse{Uri: nbdURI(export, at)})
	}
	n, err := a.s.node()
	if err != nil {
		return err
	}
	before, err := a.find(ctx, r.GetName())
	if err != nil {
		return err
	}
	attach, err := a.attachFor(r)
	switch {
	case err != nil:
		return err
	case r.GetReadOnly() && r.GetShared():
		return fmt.Errorf("serve: one of two that both write is not read-only: %w", trivet.ErrInvalid)
	case r.GetReadOnly():
		attach = a.attachReader
	}
	v, err := attach(ctx, r.GetName())
	if err != nil {
		return err
	}
	serveErr := n.ServeNBD(ctx, v.ID, service)
	if !served && before.GrantOf(a.s.cfg.Node) != nil {
		return serveErr // whoever has it attached goes on; a node that recovers its cache must not be fenced for this
	}
	// The client is gone, so its context is too: the detach gets one of its own.
	detach, cancel := context.WithTimeout(context.WithoutCancel(ctx), detachTimeout)
	defer cancel()
	defer context.AfterFunc(a.s.calls, cancel)()
	return errors.Join(serveErr, a.s.controller.Detach(detach, v.ID, a.s.cfg.Node))
}

// nbdService checks where and how a volume is to be served.
func (a *admin) nbdService(r *api.ServeVolumeRequest) (node.NBDService, error) {
	files := []string{r.GetTlsCert(), r.GetTlsKey(), r.GetTlsCa()}
	given := 0
	for _, f := range files {
		if f != "" {
			given++
		}
	}
	switch {
	case (r.GetSocket() == "") == (r.GetListen() == ""):
		return node.NBDService{}, fmt.Errorf("serve: want a socket or an address to listen at, one of both: %w",
			trivet.ErrInvalid)
	case r.GetSocket() != "" && !filepath.IsAbs(r.GetSocket()):
		return node.NBDService{}, fmt.Errorf("socket %q: want an absolute path: %w", r.GetSocket(), trivet.ErrInvalid)
	case r.GetSocket() != "" && given > 0:
		return node.NBDService{}, fmt.Errorf("socket %q: a unix socket has no TLS: %w", r.GetSocket(), trivet.ErrInvalid)
	case r.GetSocket() != "":
		return node.NBDService{Socket: r.GetSocket()}, nil
	case given == 0:
		config := a.s.creds.ForeignServerConfig(pki.RoleClient, pki.RoleNode)
		return node.NBDService{Listen: r.GetListen(), TLS: config}, nil
	case given < len(files):
		return node.NBDService{}, fmt.Errorf("serve at %s: certificate, key and CA belong together, one is missing: %w",
			r.GetListen(), trivet.ErrInvalid)
	}
	config, err := tlsFromFiles(files[0], files[1], files[2])
	if err != nil {
		return node.NBDService{}, fmt.Errorf("serve at %s: %w: %w", r.GetListen(), err, trivet.ErrInvalid)
	}
	return node.NBDService{Listen: r.GetListen(), TLS: config}, nil
}

// tlsFromFiles returns TLS 1.3 with a certificate of the operator's own, for clients whose certificates
// a CA has signed.
func tlsFromFiles(cert, key, ca string) (*tls.Config, error) {
	for _, path := range []string{cert, key, ca} {
		if !filepath.IsAbs(path) {
			return nil, fmt.Errorf("%q: want an absolute path", path)
		}
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s: no certificate in it", ca)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		SessionTicketsDisabled:      true, // each connection is checked in full
		DynamicRecordSizingDisabled: true, // full records from the start: this is bulk transfer
	}, nil
}

// nbdURI returns the URI of an export (NetworkBlockDevice/nbd doc/uri.md).
func nbdURI(export string, at net.Addr) string {
	if at.Network() == "unix" {
		socket := url.URL{Path: at.String()} // escaped as a path: slashes stay readable
		return (&url.URL{Scheme: "nbd+unix", Path: "/" + export, RawQuery: "socket=" + socket.EscapedPath()}).String()
	}
	return (&url.URL{Scheme: "nbds", Host: at.String(), Path: "/" + export}).String()
}
