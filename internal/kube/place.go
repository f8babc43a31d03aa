package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
)

// Place is where a node stands; fields that are not known are empty.
type Place struct {
	Zone string `json:"zone,omitempty"`
	Rack string `json:"rack,omitempty"`
}

// PlaceLabels are the labels of a Kubernetes node that say where it stands; an empty one is not looked at.
type PlaceLabels struct{ Zone, Rack string }

// Validate returns ErrInvalid for what cannot be a label's key.
func (l PlaceLabels) Validate() error {
	for _, key := range []string{l.Zone, l.Rack} {
		if why := validation.IsQualifiedName(key); key != "" && len(why) > 0 {
			return fmt.Errorf("label %q: %s: %w", key, strings.Join(why, "; "), trivet.ErrInvalid)
		}
	}
	return nil
}

// NodeReader reads nodes. *API is one.
type NodeReader interface {
	Node(ctx context.Context, name string) (*corev1.Node, error)
}

// servePlace answers with the place of the node that the asking pod runs on, so that the nodes' pods need no right to
// read nodes.
func (i *Issuer) servePlace(w http.ResponseWriter, r *http.Request) {
	place, err := i.place(r)
	if err != nil {
		i.refused(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(place) // an error is a client that is gone; it comes again
}

// place returns the place of the node of a request's token, or a *refusal.
func (i *Issuer) place(r *http.Request) (Place, error) {
	labels := i.cfg.Labels
	if labels == (PlaceLabels{}) {
		return Place{}, refuse(http.StatusNotFound, "the issuer was told of no label: --zone-label, --rack-label")
	}
	token, err := bearer(r)
	if err != nil {
		return Place{}, err
	}
	release, err := i.enter()
	if err != nil {
		return Place{}, err
	}
	defer release()
	name, err := i.nodeOf(r.Context(), token)
	if err != nil {
		return Place{}, err
	}
	node, err := i.cfg.Nodes.Node(r.Context(), string(name))
	if err != nil {
		i.log.Warn("cannot ask the API server for a node", "node", string(name), "err", err)
		return Place{}, refuse(http.StatusServiceUnavailable, "cannot ask the API server for node %s, come again", name)
	}
	for _, key := range []string{labels.Zone, labels.Rack} {
		if _, ok := node.Labels[key]; key != "" && !ok {
			i.log.Warn("a node has no label", "node", string(name), "label", key)
		}
	}
	return Place{Zone: node.Labels[labels.Zone], Rack: node.Labels[labels.Rack]}, nil
}

// placePatience is how long WritePlace waits for an answer where one of before is there.
const placePatience = 10 * time.Second

// WritePlace asks the issuer where the pod's node stands, and writes the answer to a file, from which ReadPlace reads
// it. Without an answer it tries again until ctx ends, ErrUnavailable, or, if an answer of before is there, for ten
// seconds, and leaves that: a node starts again without Kubernetes' help. An issuer that refuses this pod, or has no
// labels to look at, is ErrInvalid. Of cfg, Dir counts for nothing.
func WritePlace(ctx context.Context, cfg EnrollConfig, file string) error {
	log := orDiscard(cfg.Logger)
	w := &waiter{log: log, what: "the place of this node"}
	_, err := ReadPlace(file)
	before := err == nil
	if before {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, placePatience)
		defer cancel()
	}
	for more := true; more; {
		var place Place
		if place, err = askPlace(ctx, cfg); err == nil {
			if err := writePlace(file, place); err != nil {
				return fmt.Errorf("write the place of node %s: %w", cfg.Node, err)
			}
			log.Info("wrote the place of this node", "zone", place.Zone, "rack", place.Rack, "file", file)
			return nil
		}
		if errors.Is(err, trivet.ErrInvalid) {
			break
		}
		more, err = w.again(ctx, err)
	}
	switch {
	case before:
		log.Warn("no answer where this node stands; the one of before is kept", "file", file, "err", err)
		return nil
	case errors.Is(err, trivet.ErrInvalid):
		return fmt.Errorf("place of node %s: %w", cfg.Node, err)
	}
	return fmt.Errorf("place of node %s: gave up: %w", cfg.Node, unavailable(err))
}

func askPlace(ctx context.Context, cfg EnrollConfig) (p Place, err error) {
	bundle, err := os.ReadFile(cfg.CAFile)
	if err != nil {
		return p, fmt.Errorf("read the cluster's ca: %w", err)
	}
	if _, err := pki.BundleCluster(bundle); err != nil {
		return p, fmt.Errorf("read the cluster's ca: %s: %w", cfg.CAFile, err)
	}
	body, err := askIssuer(ctx, cfg, bundle, http.MethodGet, pathPlace, nil)
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal(body, &p); err != nil {
		return p, fmt.Errorf("the issuer's answer: %v: %w", err, trivet.ErrUnavailable)
	}
	return p, nil
}

// writePlace replaces the file as a whole.
func writePlace(file string, p Place) error {
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	tmp := filepath.Join(filepath.Dir(file), "."+filepath.Base(file)+".tmp")
	if err := os.WriteFile(tmp, append(text, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

// ReadPlace reads what WritePlace wrote: ErrNotFound without a file, ErrInvalid for one that is not of it.
func ReadPlace(file string) (p Place, err error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return p, fmt.Errorf("%s: %w; `trivet kube place` writes it", file, trivet.ErrNotFound)
	}
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal(text, &p); err != nil {
		return p, fmt.Errorf("%s: %v; remove it, and `trivet kube place` writes it anew: %w", file, err, trivet.ErrInvalid)
	}
	return p, nil
}
