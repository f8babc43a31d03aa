package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
	"github.com/trivet-csi/trivet/internal/pki"
)

func newCertEnroll() *cobra.Command {
	var (
		cfg     kube.EnrollConfig
		node    string
		renew   bool
		timeout time.Duration
		logs    logging
	)
	cmd := &cobra.Command{
		Use:   "enroll --issuer https://HOST:PORT --ca FILE --token FILE --node NAME --dir DIR",
		Short: "Get this node's certificate from `trivet kube issuer`, for a key that stays here",
		Long: "Returns at once when the folder holds a certificate of the node with more than a third of its validity\n" +
			"left. Otherwise it makes a key, proves by the pod's token who it is, and waits until the issuer has certified it.",
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.open()
			if err != nil {
				return err
			}
			cfg.Node, cfg.Logger = trivet.NodeID(node), log
			if err := cfg.Validate(); err != nil {
				return usageError{err}
			}
			if err := enrollWithin(cmd.Context(), cfg, timeout); err != nil || !renew {
				return err
			}
			kube.KeepEnrolled(cmd.Context(), cfg)
			return nil
		},
	}
	askingFlags(cmd, &cfg, &node)
	f := cmd.Flags()
	f.StringVar(&cfg.Dir, "dir", "", "folder for ca.crt, node.crt and node.key")
	f.BoolVar(&renew, "renew", false, "go on and renew the certificate when a third of its validity is left")
	f.DurationVar(&timeout, "timeout", kubeTimeout, "give up on the first certificate after this long")
	logs.flags(cmd)
	return cmd
}

// askingFlags are those of the commands that ask the issuer.
func askingFlags(cmd *cobra.Command, cfg *kube.EnrollConfig, node *string) {
	f := cmd.Flags()
	f.StringVar(&cfg.Issuer, "issuer", "", "address of the issuer, as https://HOST:PORT")
	f.StringVar(&cfg.CAFile, "ca", "", "file with the cluster's CA, as the ConfigMap "+kube.ConfigMapName+" shows it")
	f.StringVar(&cfg.TokenFile, "token", "", "file with the pod's token for the audience "+kube.Audience)
	f.StringVar(node, "node", envOr("TRIVET_NODE", ""), "name of the node that the pod runs on (TRIVET_NODE)")
}

func newKubePlace() *cobra.Command {
	var (
		cfg     kube.EnrollConfig
		node    string
		file    string
		timeout time.Duration
		logs    logging
	)
	cmd := &cobra.Command{
		Use:   "place --issuer https://HOST:PORT --ca FILE --token FILE --node NAME --file FILE",
		Short: "Write the zone and the rack of this node, from its labels, for `trivet server --place-file`",
		Long: "Asks `trivet kube issuer`, which reads the labels, so that the pod needs no right to read nodes. If there\n" +
			"is no answer within ten seconds and the file is there from before, that is left as it is.",
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.open()
			if err != nil {
				return err
			}
			cfg.Node, cfg.Logger, cfg.Dir = trivet.NodeID(node), log, filepath.Dir(file)
			if file == "" {
				return usageError{errors.New("--file is missing")}
			}
			if err := cfg.Validate(); err != nil {
				return usageError{err}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return kube.WritePlace(ctx, cfg, file)
		},
	}
	askingFlags(cmd, &cfg, &node)
	f := cmd.Flags()
	f.StringVar(&file, "file", "", "the file to write")
	f.DurationVar(&timeout, "timeout", kubeTimeout, "give up after this long when there is no file from before")
	logs.flags(cmd)
	return cmd
}

func enrollWithin(ctx context.Context, cfg kube.EnrollConfig, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return kube.Enroll(ctx, cfg)
}

// certView is a certificate as `trivet cert show` shows it.
type certView struct {
	Role    pki.Role         `json:"role"`
	Name    string           `json:"name"`
	Cluster trivet.ClusterID `json:"cluster"`
	Serial  string           `json:"serial"`
	Until   time.Time        `json:"validUntil"`
}

func newCertShow(o *options) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "show --dir DIR",
		Short: "Show the certificates in a folder; fails unless there is one and all can be used now",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			views, unusable, err := viewCerts(dir)
			if err != nil {
				return err
			}
			t := table{header: []string{"ROLE", "NAME", "CLUSTER", "VALID UNTIL"}}
			for _, v := range views {
				t.rows = append(t.rows, []string{
					string(v.Role), v.Name, string(v.Cluster), v.Until.UTC().Format(time.RFC3339),
				})
			}
			return errors.Join(o.show(cmd.OutOrStdout(), views, t), unusable)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", defaultCerts(), "folder with ca.crt and certificates")
	return cmd
}

// viewCerts returns the certificates in a folder, and why some cannot be used.
func viewCerts(dir string) (views []certView, unusable, err error) {
	held, err := pki.Held(dir)
	if err != nil {
		return nil, nil, err
	}
	bundle, err := pki.ReadBundle(dir)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range held {
		info, err := pki.Inspect(p.CertPEM)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", dir, err)
		}
		views = append(views, certView{
			Role: info.Identity.Role, Name: info.Identity.Name, Cluster: info.Identity.Cluster, Serial: info.Serial,
			Until: info.Until,
		})
		unusable = errors.Join(unusable, p.Verify(bundle))
	}
	return views, unusable, nil
}
