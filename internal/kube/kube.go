// Package kube makes the certificates of a cluster, and the cluster itself, on Kubernetes, where nobody
// logs in to a machine to copy a key. It is three things:
//
//   - EnsureCA and Bear are what an init Job does: they make the CA once, kept in a Secret, and give
//     birth to the cluster on one server, once, however often the Job runs.
//   - An Issuer runs where the Secret is mounted. It signs certificates for nodes that prove who they
//     are by the ServiceAccount token of a pod there: the API server says on which node that pod runs,
//     and the certificate is of that node and no other, whatever was asked for.
//   - Enroll and KeepEnrolled run on the nodes. They make a key, which never leaves the node, get it
//     certified and keep it so.
//
// So the CA's key is where the Secret is mounted and nowhere else, and a stolen node can only ever be
// itself.
//
// Beside these it has what a controller needs (internal/failover): nodes, pods and attachments, and an Elector, by
// which one of several processes leads.
//
// The Kubernetes API is reached through API, by plain REST calls of client-go: its typed clients would
// double the size of the program, for the few calls made here. Left to the caller: who may read the
// Secret and use the ServiceAccount (RBAC), and revocation, of which there is none.
package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
)

// Names of what an init Job keeps in its namespace.
const (
	SecretName    = "trivet-ca" // the CA: KeyCACert and KeyCAKey
	ConfigMapName = "trivet-ca" // public: KeyCACert, and what is known of the birth

	KeyCACert    = "ca.crt"
	KeyCAKey     = "ca.key"
	KeyBirthNode = "birthNode" // the one node on which the cluster may be born, written before it is
	KeyBorn      = "born"      // the cluster that was born; no birth is tried any more
)

// Audience is the audience of the tokens by which nodes prove who they are: one of another audience,
// such as that for the API server, gets no certificate.
const Audience = "csi.trivet.dev"

// namespaceFile is where a pod finds its namespace.
const namespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

// Namespace returns the namespace of the pod that this process runs in, or "" outside of one.
func Namespace() string {
	b, err := os.ReadFile(namespaceFile)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Pauses between tries of something that is waited for.
const (
	pauseMin = 250 * time.Millisecond
	pauseMax = 5 * time.Second
)

// waiter repeats something until it works, and says why it waits, once for each reason.
type waiter struct {
	log   *slog.Logger
	what  string
	pause time.Duration
	last  error // why it waited
}

// again waits after a try that did not work. When ctx has ended it returns false, and why nothing had worked: the
// reason of the try before, if this one was cut off.
func (w *waiter) again(ctx context.Context, reason error) (bool, error) {
	if ctx.Err() != nil {
		if w.last != nil {
			reason = w.last
		}
		return false, reason
	}
	if w.last == nil || reason.Error() != w.last.Error() {
		w.log.Info("waiting", "for", w.what, "err", reason)
	}
	w.last = reason
	w.pause = min(max(pauseMin, 2*w.pause), pauseMax)
	select {
	case <-ctx.Done():
		return false, reason
	case <-time.After(w.pause):
		return true, nil
	}
}

// repeat calls fn after each pause until ctx ends, and complain for each new reason why it fails.
func repeat(ctx context.Context, pause time.Duration, fn func() error, complain func(error)) {
	last := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		switch err := fn(); {
		case err == nil:
			last = ""
		case ctx.Err() == nil && err.Error() != last:
			last = err.Error()
			complain(err)
		}
	}
}

// unavailable makes an error ErrUnavailable, if it is not.
func unavailable(err error) error {
	if errors.Is(err, trivet.ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %w", err, trivet.ErrUnavailable)
}

func orDiscard(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return log
}
