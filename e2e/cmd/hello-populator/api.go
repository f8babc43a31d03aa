package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

// metadata, claim and reference are what is read of objects.
type metadata struct {
	Name              string            `json:"name"`
	Namespace         string            `json:"namespace"`
	UID               string            `json:"uid,omitempty"`
	ResourceVersion   string            `json:"resourceVersion,omitempty"`
	DeletionTimestamp string            `json:"deletionTimestamp,omitempty"`
	Annotations       map[string]string `json:"annotations,omitempty"`
	Finalizers        []string          `json:"finalizers,omitempty"`
}

type claim struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Metadata   metadata `json:"metadata"`
	Spec       struct {
		AccessModes      []string        `json:"accessModes"`
		Resources        json.RawMessage `json:"resources"`
		StorageClassName string          `json:"storageClassName,omitempty"`
		VolumeMode       string          `json:"volumeMode,omitempty"`
		VolumeName       string          `json:"volumeName,omitempty"`
		DataSourceRef    *source         `json:"dataSourceRef,omitempty"`
	} `json:"spec"`
	Status struct {
		Phase string `json:"phase,omitempty"`
	} `json:"status"`
}

type source struct {
	APIGroup string `json:"apiGroup"`
	Kind     string `json:"kind"`
	Name     string `json:"name"`
}

type reference struct {
	Namespace       string `json:"namespace"`
	Name            string `json:"name"`
	UID             string `json:"uid"`
	ResourceVersion string `json:"resourceVersion"`
}

// prime returns the own claim for p: of the same class, size and node, and without a source.
func (p *claim) prime(namespace, name string) *claim {
	own := &claim{APIVersion: "v1", Kind: "PersistentVolumeClaim", Spec: p.Spec}
	own.Metadata = metadata{Name: name, Namespace: namespace}
	own.Spec.DataSourceRef = nil
	if node := p.Metadata.Annotations[selectedNode]; node != "" {
		own.Metadata.Annotations = map[string]string{selectedNode: node}
	}
	return own
}

// client calls the API server of the pod that this runs in.
type client struct {
	base, token string
	http        http.Client
}

// secrets is where a pod finds what it needs for that.
const secrets = "/var/run/secrets/kubernetes.io/serviceaccount/"

func inCluster() (*client, error) {
	token, errToken := os.ReadFile(secrets + "token")
	ca, errCA := os.ReadFile(secrets + "ca.crt")
	if err := errors.Join(errToken, errCA); err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New(secrets + "ca.crt: no certificate")
	}
	host := net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"))
	return &client{
		base: "https://" + host, token: string(token),
		http: http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		}},
	}, nil
}

// refusal is an answer of the API server that is no success.
type refusal struct {
	code int
	text string
}

func (r *refusal) Error() string { return fmt.Sprintf("%d: %s", r.code, r.text) }

func isNotFound(err error) bool {
	var r *refusal
	return errors.As(err, &r) && r.code == http.StatusNotFound
}

func (c *client) get(path string, into any) error { return c.do(http.MethodGet, path, "", nil, into) }

// post makes an object; one that is there already is success.
func (c *client) post(path string, object any) error {
	err := c.do(http.MethodPost, path, "application/json", object, nil)
	var r *refusal
	if errors.As(err, &r) && r.code == http.StatusConflict {
		return nil
	}
	return err
}

func (c *client) patch(path string, change any) error {
	return c.do(http.MethodPatch, path, "application/merge-patch+json", change, nil)
}

func (c *client) do(method, path, kind string, body, into any) error {
	var send io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		send = bytes.NewReader(b)
	}
	r, err := http.NewRequest(method, c.base+path, send)
	if err != nil {
		return err
	}
	r.Header.Set("Authorization", "Bearer "+c.token)
	r.Header.Set("Content-Type", kind)
	resp, err := c.http.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %w", method, path, &refusal{resp.StatusCode, string(text)})
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(text, into)
}
