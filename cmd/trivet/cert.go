package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
)

// issue makes a certificate and writes it into dir.
func issue(ca *pki.CA, dir string, role pki.Role, name string, validity time.Duration) error {
	pair, err := ca.Issue(pki.Identity{Cluster: ca.Cluster(), Role: role, Name: name}, pki.For(validity))
	if err != nil {
		return err
	}
	return pki.Write(dir, ca.CertPEM(), pair)
}

func newCert(o *options) *cobra.Command {
	return group("cert", "Make the certificates of a cluster", newCertCA(o), newCertLeaf(o, pki.RoleNode),
		newCertLeaf(o, pki.RoleClient), newCertEnroll(), newCertShow(o))
}

func newCertCA(o *options) *cobra.Command {
	var dir, cluster string
	cmd := &cobra.Command{
		Use:   "ca --dir DIR",
		Short: "Make the certificate authority of a new cluster; keep ca.key off the nodes",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cluster == "" {
				cluster = trivet.NewUUID()
			}
			if err := trivet.ValidateUUID(cluster); err != nil {
				return usageError{fmt.Errorf("--cluster: %w", err)}
			}
			ca, err := pki.NewCA(trivet.ClusterID(cluster), pki.For(pki.CAValidity))
			if err != nil {
				return err
			}
			if err := pki.WriteCA(dir, ca); err != nil {
				return err
			}
			return o.show(cmd.OutOrStdout(), map[string]string{"cluster": cluster, "dir": dir},
				table{rows: [][]string{{"cluster " + cluster + ": ca.crt and ca.key are in " + dir}}})
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "ca", "folder for ca.crt and ca.key")
	cmd.Flags().StringVar(&cluster, "cluster", "", "cluster UUID (default: a new one)")
	return cmd
}

func newCertLeaf(o *options, role pki.Role) *cobra.Command {
	var (
		ca, dir  string
		validity time.Duration
	)
	cmd := &cobra.Command{
		Use:   string(role) + " NAME --ca DIR --dir DIR",
		Short: fmt.Sprintf("Make the certificate of a %s: ca.crt, %[1]s.crt and %[1]s.key", role),
		Args:  exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if validity <= 0 {
				return usageError{errors.New("--validity: want more than zero")}
			}
			authority, err := pki.LoadCA(ca)
			if err != nil {
				return fmt.Errorf("%w\n  --ca names the folder that `trivet cert ca` made", err)
			}
			if err := issue(authority, dir, role, args[0], validity); err != nil {
				return err
			}
			return o.show(cmd.OutOrStdout(), map[string]string{"name": args[0], "role": string(role), "dir": dir},
				table{rows: [][]string{{fmt.Sprintf("%s %s: %s.crt and %[1]s.key are in %s", role, args[0], role, dir)}}})
		},
	}
	cmd.Flags().StringVar(&ca, "ca", "ca", "folder with ca.crt and ca.key")
	cmd.Flags().StringVar(&dir, "dir", defaultCerts(), "folder for the certificate and key")
	cmd.Flags().DurationVar(&validity, "validity", pki.LeafValidity, "how long the certificate is valid")
	return cmd
}
