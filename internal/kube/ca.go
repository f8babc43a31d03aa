package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"

	corev1 "k8s.io/api/core/v1"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
)

// Secrets keeps the CA. *API is one.
type Secrets interface {
	Secret(ctx context.Context, name string) (*corev1.Secret, error)
	CreateSecret(ctx context.Context, s *corev1.Secret) error
}

// ConfigMaps keeps what everybody may know. *API is one.
type ConfigMaps interface {
	ConfigMap(ctx context.Context, name string) (*corev1.ConfigMap, error)
	CreateConfigMap(ctx context.Context, m *corev1.ConfigMap) error
	UpdateConfigMap(ctx context.Context, m *corev1.ConfigMap) error
}

// Authority is a CA with the bundle of certificates that are trusted: its own, and others of the same
// cluster during a rotation.
type Authority struct {
	CA        *pki.CA
	BundlePEM []byte
}

// LoadAuthority reads ca.crt and ca.key from dir, as a mounted Secret. It errs as pki.LoadCA does.
func LoadAuthority(dir string) (*Authority, error) {
	ca, err := pki.LoadCA(dir)
	if err != nil {
		return nil, err
	}
	bundle, err := pki.ReadBundle(dir)
	if err != nil {
		return nil, err
	}
	if _, err := pki.BundleCluster(bundle); err != nil {
		return nil, fmt.Errorf("load ca from %s: %w", dir, err)
	}
	return &Authority{CA: ca, BundlePEM: bundle}, nil
}

// EnsureCA returns the cluster's CA in the Secret, which it makes when there is none, and publishes its
// certificate in the ConfigMap. It may run any number of times, also at once: all get the same CA. It
// waits for an API server that does not answer until ctx ends: ErrUnavailable. Errors that need an
// operator are ErrInvalid: a Secret that holds no CA, or none where the ConfigMap says that there was
// one, for a new CA would cut off every node of the old.
func EnsureCA(ctx context.Context, secrets Secrets, maps ConfigMaps, log *slog.Logger) (*Authority, error) {
	w := &waiter{log: orDiscard(log), what: "the Kubernetes API"}
	for {
		a, err := ensureCA(ctx, secrets, maps, w.log)
		if err == nil || errors.Is(err, trivet.ErrInvalid) {
			return a, err
		}
		if more, why := w.again(ctx, err); !more {
			return nil, fmt.Errorf("ensure ca: gave up: %w", unavailable(why))
		}
	}
}

func ensureCA(ctx context.Context, secrets Secrets, maps ConfigMaps, log *slog.Logger) (*Authority, error) {
	secret, err := secrets.Secret(ctx, SecretName)
	if errors.Is(err, trivet.ErrNotFound) {
		secret, err = createCA(ctx, secrets, maps, log)
	}
	if err != nil {
		return nil, err
	}
	a, err := parseAuthority(secret)
	if err != nil {
		return nil, fmt.Errorf("secret %s holds no ca of a cluster; put the right one back from a backup, or, to begin a "+
			"new cluster, delete it and the ConfigMap %s: %w", SecretName, ConfigMapName, err)
	}
	return a, publish(ctx, maps, a)
}

// createCA makes a CA and returns the Secret that won, in case another Job makes one too.
func createCA(ctx context.Context, secrets Secrets, maps ConfigMaps, log *slog.Logger) (*corev1.Secret, error) {
	m, err := maps.ConfigMap(ctx, ConfigMapName)
	switch {
	case err == nil && m.Data[KeyCACert] != "":
		// The Secret is made first, so it may be that another Job made both since we looked.
		secret, err := secrets.Secret(ctx, SecretName)
		if errors.Is(err, trivet.ErrNotFound) {
			return nil, fmt.Errorf("secret %s is gone, but the ConfigMap %s shows that there was a ca; put the Secret back "+
				"from a backup, or, to begin a new cluster, delete the ConfigMap: %w", SecretName, ConfigMapName,
				trivet.ErrInvalid)
		}
		return secret, err
	case err != nil && !errors.Is(err, trivet.ErrNotFound):
		return nil, err
	}
	ca, err := pki.NewCA(trivet.ClusterID(trivet.NewUUID()), pki.For(pki.CAValidity))
	if err != nil {
		return nil, err
	}
	key, err := ca.KeyPEM()
	if err != nil {
		return nil, err
	}
	secret := &corev1.Secret{
		ObjectMeta: newObject(SecretName), Type: corev1.SecretTypeOpaque,
		Data: map[string][]byte{KeyCACert: ca.CertPEM(), KeyCAKey: key},
	}
	switch err := secrets.CreateSecret(ctx, secret); {
	case errors.Is(err, trivet.ErrExists):
		return secrets.Secret(ctx, SecretName)
	case err != nil:
		return nil, err
	}
	log.Info("made the ca of a new cluster", "cluster", string(ca.Cluster()), "secret", SecretName)
	return secret, nil
}

// OnlyExisting returns secrets of which none is made: EnsureCA waits for the CA that somebody else makes.
func OnlyExisting(s Secrets) Secrets { return onlyExisting{s} }

type onlyExisting struct{ Secrets }

// CreateSecret makes nothing.
func (onlyExisting) CreateSecret(_ context.Context, s *corev1.Secret) error {
	return fmt.Errorf("the Secret %s is not there yet, and not for us to make: %w", s.Name, trivet.ErrUnavailable)
}

// parseAuthority takes what EnsureCA makes, or a Secret of the form that Kubernetes has for certificates, as
// cert-manager makes them.
func parseAuthority(s *corev1.Secret) (*Authority, error) {
	bundle, key := s.Data[KeyCACert], s.Data[KeyCAKey]
	if len(key) == 0 && len(s.Data[corev1.TLSPrivateKeyKey]) > 0 {
		bundle, key = s.Data[corev1.TLSCertKey], s.Data[corev1.TLSPrivateKeyKey]
	}
	ca, err := pki.ParseCA(bundle, key)
	if err != nil {
		return nil, err
	}
	if _, err := pki.BundleCluster(bundle); err != nil {
		return nil, err
	}
	return &Authority{CA: ca, BundlePEM: bundle}, nil
}

// publish makes the ConfigMap show the CA.
func publish(ctx context.Context, maps ConfigMaps, a *Authority) error {
	m, err := maps.ConfigMap(ctx, ConfigMapName)
	switch {
	case errors.Is(err, trivet.ErrNotFound):
		return maps.CreateConfigMap(ctx, &corev1.ConfigMap{
			ObjectMeta: newObject(ConfigMapName), Data: map[string]string{KeyCACert: string(a.BundlePEM)},
		})
	case err != nil:
		return err
	case bytes.Equal([]byte(m.Data[KeyCACert]), a.BundlePEM):
		return nil
	}
	// What the ConfigMap says of a birth is of the cluster whose CA it shows.
	old, err := pki.BundleCluster([]byte(m.Data[KeyCACert]))
	if err == nil && old != a.CA.Cluster() && (m.Data[KeyBirthNode] != "" || m.Data[KeyBorn] != "") {
		return fmt.Errorf("secret %s holds the ca of cluster %s, the ConfigMap %s shows cluster %s, which has been born; "+
			"put the right Secret back, or, to begin a new cluster, delete the ConfigMap: %w", SecretName, a.CA.Cluster(),
			ConfigMapName, old, trivet.ErrInvalid)
	}
	if m.Data == nil {
		m.Data = map[string]string{}
	}
	m.Data[KeyCACert] = string(a.BundlePEM)
	return maps.UpdateConfigMap(ctx, m)
}
