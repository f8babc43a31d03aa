package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
)

// ClientConfig says which client is to have a certificate, and where. It runs beside the CA.
type ClientConfig struct {
	Authority *Authority
	Name      string        // of the client
	Dir       string        // gets ca.crt, client.crt and client.key
	Validity  time.Duration // 0 is pki.LeafValidity
	Logger    *slog.Logger  // nil discards
}

// WriteClient gives a client a certificate, in place of the one that it may have. It returns ErrInvalid,
// and changes nothing, when the directory is of another cluster or client.
func WriteClient(cfg ClientConfig) error {
	if cfg.Validity == 0 {
		cfg.Validity = pki.LeafValidity
	}
	ca := cfg.Authority.CA
	id := pki.Identity{Cluster: ca.Cluster(), Role: pki.RoleClient, Name: cfg.Name}
	p, err := ca.Issue(id, ca.Within(pki.For(cfg.Validity)))
	if err != nil {
		return err
	}
	if err := pki.Install(cfg.Dir, cfg.Authority.BundlePEM, p); err != nil {
		return err
	}
	info, err := pki.Inspect(p.CertPEM)
	if err != nil {
		return err
	}
	orDiscard(cfg.Logger).Info("wrote a client's certificate", "client", cfg.Name, "serial", info.Serial,
		"until", info.Until, "dir", cfg.Dir)
	return nil
}

// KeepClient renews what WriteClient wrote when a third of its validity is left, or when it is not there
// any more, until ctx ends. It looks every time that every has passed; 0 is a minute.
func KeepClient(ctx context.Context, cfg ClientConfig, every time.Duration) {
	if every <= 0 {
		every = checkEvery
	}
	repeat(ctx, every, func() error { return renewClient(cfg) }, func(err error) {
		orDiscard(cfg.Logger).Warn("cannot renew the client's certificate", "dir", cfg.Dir, "err", err)
	})
}

func renewClient(cfg ClientConfig) error {
	p, err := pki.ReadPair(cfg.Dir, pki.RoleClient)
	if err != nil && !errors.Is(err, trivet.ErrNotFound) {
		return err
	}
	if err == nil && p.Verify(cfg.Authority.BundlePEM) == nil {
		info, err := pki.Inspect(p.CertPEM)
		if err != nil {
			return fmt.Errorf("%s: %w", cfg.Dir, err)
		}
		if time.Now().Before(info.RenewAt()) {
			return nil
		}
	}
	return WriteClient(cfg)
}
