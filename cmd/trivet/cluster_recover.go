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
	var accept bool
	cmd := &cobra.Command{
		Use:   "recover VOLUME",
		Short: "Give up the lost majority of a volume's replicas; what the survivor did not have is lost",
		Long: "Make the surviving replica with the newest log the only one of a volume, when a majority of its replicas is " +
			"lost\n" +
			"for good. What was acknowledged and had not reached the survivor is LOST. The lost replicas never come back, " +
			"even\n" +
			"if their nodes do; whoever has the volume attached is fenced; replicas are added again from the survivor. First\n" +
			"shows what it would do, then asks for the name of the volume. Refused while a majority lives.",
		Example: "  trivet cluster recover db\n  trivet cluster recover db --yes-i-accept-data-loss",
		Args:    exactArgs("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				plan, err := c.RecoverVolume(ctx, &api.RecoverVolumeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if !accept {
					fmt.Fprint(cmd.ErrOrStderr(), recoveryText(plan))
					if err := confirm(cmd.InOrStdin(), cmd.ErrOrStderr(), plan.GetVolume().GetName()); err != nil {
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
	return cmd
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
func confirm(in io.Reader, out io.Writer, name string) error {
	fmt.Fprintf(out, "Type the name of the volume to go on: ")
	line, err := bufio.NewReader(in).ReadString('\n')
	if got := strings.TrimSpace(line); got != name {
		if err != nil && got == "" {
			return fmt.Errorf("nothing was changed: no answer; --yes-i-accept-data-loss does not ask")
		}
		return fmt.Errorf("nothing was changed: %q is not %q", got, name)
	}
	return nil
}
