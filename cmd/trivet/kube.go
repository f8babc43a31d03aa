package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/internal/kube"
	"github.com/trivet-csi/trivet/internal/pki"
)

// kubeTimeout is how long the commands that wait for other parts of an installation do so by default:
// images are pulled in that time.
const kubeTimeout = 10 * time.Minute

// validityMin is the shortest validity that can be renewed in good time.
const validityMin = 15 * time.Minute

func newKube(o *options) *cobra.Command {
	return group("kube", "Install on Kubernetes: what its pods run", newKubeInit(o), newKubeIssuer(),
		newKubePlace())
}

// logging is the flags of a command that logs as a server does.
type logging struct {
	level string
	json  bool
}

func (l *logging) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.level, "log-level", "info", "debug, info, warn or error")
	cmd.Flags().BoolVar(&l.json, "log-json", false, "log as JSON")
}

func (l *logging) open() (*slog.Logger, error) { return newLogger(l.level, l.json) }

// inCluster returns the Kubernetes API of the pod that runs the command.
func inCluster(namespace string) (*kube.API, error) {
	if namespace == "" {
		return nil, usageError{errors.New("--namespace is missing: this is not a pod, which knows its own")}
	}
	return kube.InCluster(namespace)
}

func newKubeInit(o *options) *cobra.Command {
	var (
		servers   []string
		namespace string
		timeout   time.Duration
		existing  bool
		logs      logging
	)
	cmd := &cobra.Command{
		Use:   "init --server HOST:PORT",
		Short: "Make the CA, once, and give birth to the cluster, once; run it as a Job, as often as you like",
		Long: "Makes the cluster's CA in the Secret " + kube.SecretName + ", shows its certificate in the ConfigMap " +
			kube.ConfigMapName + ", waits for\nservers, and gives birth to the cluster on one of them. That node's name is " +
			"written into the ConfigMap first\n(key " + kube.KeyBirthNode + "), so that a Job that is repeated never gives " +
			"birth on another.",
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.open()
			if err != nil {
				return err
			}
			if len(servers) == 0 {
				return usageError{errors.New("--server is missing")}
			}
			kubeAPI, err := inCluster(namespace)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			birth, err := kubeInit(ctx, kubeAPI, existing, servers, log)
			if err != nil {
				return err
			}
			return o.showBirth(cmd, birth)
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&servers, "server", nil,
		"host:port of servers; a host may have many addresses, as a headless Service; several may be given")
	f.StringVar(&namespace, "namespace", kube.Namespace(),
		"namespace of the Secret and the ConfigMap (default: the pod's)")
	f.DurationVar(&timeout, "timeout", kubeTimeout, "give up after this long")
	f.BoolVar(&existing, "existing-ca", false, "make no CA: wait for the Secret, which somebody else makes")
	logs.flags(cmd)
	return cmd
}

// kubeInit makes the CA, or waits for it if it has to be there, and the cluster, unless they are there.
func kubeInit(ctx context.Context, api *kube.API, existing bool, servers []string, log *slog.Logger,
) (kube.Birth, error) {
	var secrets kube.Secrets = api
	if existing {
		secrets = kube.OnlyExisting(api)
	}
	authority, err := kube.EnsureCA(ctx, secrets, api, log)
	if err != nil {
		return kube.Birth{}, err
	}
	admins, err := kube.NewAdmins(authority, servers...)
	if err != nil {
		return kube.Birth{}, err
	}
	return kube.Bear(ctx, authority.CA.Cluster(), api, admins, log)
}

func (o *options) showBirth(cmd *cobra.Command, b kube.Birth) error {
	text := fmt.Sprintf("cluster %s lives; it was born on node %s", b.Cluster, b.Node)
	if b.Now {
		text = fmt.Sprintf("cluster %s was born on node %s now", b.Cluster, b.Node)
	}
	view := map[string]any{"cluster": b.Cluster, "node": b.Node, "bornNow": b.Now}
	return o.show(cmd.OutOrStdout(), view, table{rows: [][]string{{text}}})
}

// issuerFlags are the flags of `trivet kube issuer`.
type issuerFlags struct {
	ca, listen, namespace string
	clientDir, clientName string
	nodeAccount           string
	validity              time.Duration
	labels                kube.PlaceLabels
	logs                  logging
}

func newKubeIssuer() *cobra.Command {
	var i issuerFlags
	cmd := &cobra.Command{
		Use:   "issuer --ca DIR --client-dir DIR",
		Short: "Give certificates to the nodes, by their pods' tokens, and to one client beside it",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := i.logs.open()
			if err != nil {
				return err
			}
			if i.validity < validityMin {
				return usageError{fmt.Errorf("--validity %s: want at least %s", i.validity, validityMin)}
			}
			kubeAPI, err := inCluster(i.namespace)
			if err != nil {
				return err
			}
			return i.run(cmd.Context(), kubeAPI, log)
		},
	}
	f := cmd.Flags()
	f.StringVar(&i.ca, "ca", "ca", "folder with ca.crt and ca.key, where the Secret "+kube.SecretName+" is mounted")
	f.StringVar(&i.listen, "listen", "0.0.0.0:7401", "host:port to listen on")
	f.StringVar(&i.namespace, "namespace", kube.Namespace(), "namespace of --node-account (default: the pod's)")
	f.StringVar(&i.nodeAccount, "node-account", "trivet-node",
		"ServiceAccount of the nodes' pods: its name, or system:serviceaccount:NAMESPACE:NAME")
	f.StringVar(&i.clientDir, "client-dir", "", "folder for the certificate of a client beside it; empty: none")
	f.StringVar(&i.clientName, "client-name", "csi-controller", "name of that client")
	f.DurationVar(&i.validity, "validity", pki.LeafValidity, "how long the certificates are valid")
	f.StringVar(&i.labels.Zone, "zone-label", "", "label of nodes with their zone, for trivet kube place; empty: none")
	f.StringVar(&i.labels.Rack, "rack-label", "", "label of nodes with their rack, for trivet kube place; empty: none")
	i.logs.flags(cmd)
	return cmd
}

// issuerAPI is what the issuer asks the API server.
type issuerAPI interface {
	kube.Reviewer
	kube.NodeReader
}

// run serves until ctx ends.
func (i *issuerFlags) run(ctx context.Context, api issuerAPI, log *slog.Logger) error {
	authority, err := kube.LoadAuthority(i.ca)
	if err != nil {
		return fmt.Errorf("%w\n  --ca names the folder where the Secret %s is mounted; `trivet kube init` makes it", err,
			kube.SecretName)
	}
	account := i.nodeAccount
	if !strings.Contains(account, ":") {
		account = "system:serviceaccount:" + i.namespace + ":" + account
	}
	issuer, err := kube.NewIssuer(kube.IssuerConfig{
		CA: authority.CA, Reviewer: api, NodeAccount: account, Validity: i.validity, Labels: i.labels, Nodes: api,
		Logger: log,
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var keeping sync.WaitGroup
	defer keeping.Wait()
	defer cancel()
	if i.clientDir != "" {
		client := kube.ClientConfig{
			Authority: authority, Name: i.clientName, Dir: i.clientDir, Validity: i.validity, Logger: log,
		}
		if err := kube.WriteClient(client); err != nil {
			return err
		}
		keeping.Go(func() { kube.KeepClient(ctx, client, 0) })
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", i.listen)
	if err != nil {
		return fmt.Errorf("listen for nodes: %w", err)
	}
	log.Info("issuing certificates", "address", l.Addr().String(), "cluster", string(authority.CA.Cluster()),
		"account", account)
	return issuer.Serve(ctx, l)
}
