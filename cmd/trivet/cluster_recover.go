package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newClusterRecover(o *options) *cobra.Command {
	var accept, catalogue bool
	cmd := &cobra.Command{
		Use:   "recover VOLUME | recover --catalogue",
		Short: "Give up the lost majority of a volume's replicas, or of the catalogue; what the survivor had not is lost",
		Long: "Make the surviving replica with the newest log the only one of a volume, when a majority of its replicas is " +
			"lost\n" +
			"for good. What was acknowledged and had not reached the survivor is LOST. The lost replicas never come back, " +
			"even\n" +
			"if their nodes do; whoever has the volume attached is fenced; replicas are added again from the survivor. First\n" +
			"shows what it would do, then asks for the name of the volume. Refused while a majority lives.\n\n" +
			"With --catalogue it is the catalogue of the cluster whose majority is lost: the server that is asked becomes the " +
			"only\nvoter of it, unless a member that lives has a newer log. A lost node must not run again with the catalogue " +
			"that it had.\nA member with a damaged entry in its log does not vote, and its log counts up to that entry only.",
		Example: "  trivet cluster recover db\n  trivet cluster recover db --yes-i-accept-data-loss\n" +
			"  trivet cluster recover --catalogue --server n1.example:7420",
		Args: func(cmd *cobra.Command, args []string) error {
			if catalogue {
				return exactArgs()(cmd, args)
			}
			return exactArgs("VOLUME")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if catalogue {
				return o.recoverCatalogue(cmd, accept)
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				plan, err := c.RecoverVolume(ctx, &api.RecoverVolumeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if !accept {
					fmt.Fprint(cmd.ErrOrStderr(), recoveryText(plan))
					if err := confirm(cmd.InOrStdin(), cmd.ErrOrStderr(), "volume", plan.GetVolume().GetName()); err != nil {
						return err
					}
				}
				done, err := c.RecoverVolume(ctx, &api.RecoverVolumeRequest{Name: args[0], AcceptDataLoss: true})
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "WARNING: %s\n", done.GetWarning())
				return o.showVolume(cmd, done.GetVolume())
			})
		},
	}
	cmd.Flags().BoolVar(&accept, "yes-i-accept-data-loss", false, "do not ask")
	cmd.Flags().BoolVar(&catalogue, "catalogue", false, "the catalogue's majority is lost, not a volume's")
	return cmd
}

func (o *options) recoverCatalogue(cmd *cobra.Command, accept bool) error {
	return o.call(cmd, func(ctx context.Context, c *client) error {
		plan, err := c.RecoverCatalogue(ctx, &api.RecoverCatalogueRequest{})
		if err != nil {
			return err
		}
		if !accept {
			fmt.Fprint(cmd.ErrOrStderr(), catalogueRecoveryText(plan))
			if err := confirm(cmd.InOrStdin(), cmd.ErrOrStderr(), "node that survives", plan.GetNode()); err != nil {
				return err
			}
		}
		done, err := c.RecoverCatalogue(ctx, &api.RecoverCatalogueRequest{AcceptDataLoss: true})
		if err != nil {
			return err
		}
		fmt.Fprintf(cmd.ErrOrStderr(), "WARNING: %s\n", done.GetWarning())
		fmt.Fprintf(cmd.OutOrStdout(), "catalogue of cluster %s is led by %s again\n", done.GetCluster(), done.GetNode())
		return nil
	})
}

func catalogueRecoveryText(p *api.RecoverCatalogueResponse) string {
	b := &strings.Builder{}
	fmt.Fprintf(b, "the catalogue of cluster %s will have one voter at first: %s, whose log ends at entry %d of term %d\n",
		p.GetCluster(), p.GetNode(), p.GetLastIndex(), p.GetLastTerm())
	for _, n := range p.GetKept() {
		fmt.Fprintf(b, "stays, as a learner at first: %s\n", n)
	}
	for _, n := range p.GetLost() {
		fmt.Fprintf(b, "given up for ever: the catalogue's member on %s\n", n)
	}
	fmt.Fprintf(b, "WARNING: %s\n", p.GetWarning())
	return b.String()
}

func recoveryText(p *api.RecoverVolumeResponse) string {
	b := &strings.Builder{}
	fmt.Fprintf(b, "volume %s (%s) will have one replica: %s on %s, whose log ends at entry %d of term %d\n",
		p.GetVolume().GetName(), p.GetVolume().GetId(), p.GetReplica(), p.GetNode(), p.GetLastIndex(), p.GetLastTerm())
	for _, l := range p.GetLost() {
		fmt.Fprintf(b, "given up for ever: %s\n", l)
	}
	fmt.Fprintf(b, "WARNING: %s\n", p.GetWarning())
	return b.String()
}

// confirm asks for a name and returns an error unless it is typed.
func confirm(in io.Reader, out io.Writer, what, name string) error {
	fmt.Fprintf(out, "Type the name of the %s to go on: ", what)
	line, err := bufio.NewReader(in).ReadString('\n')
	if got := strings.TrimSpace(line); got != name {
		if err != nil && got == "" {
			return fmt.Errorf("nothing was changed: no answer; --yes-i-accept-data-loss does not ask")
		}
		return fmt.Errorf("nothing was changed: %q is not %q", got, name)
	}
	return nil
}
