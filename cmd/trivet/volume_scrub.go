package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

// scrubView is what `trivet volume scrub -o json` prints.
type scrubView struct {
	ID           string   `json:"id"`
	Name         string   `json:"name"`
	Pass         uint64   `json:"pass"`
	Running      bool     `json:"running"`
	Verify       bool     `json:"verify"`
	RateBytes    int64    `json:"rateBytes"`
	Started      string   `json:"started,omitempty"`
	Ended        string   `json:"ended,omitempty"`
	LastScrub    string   `json:"lastScrub,omitempty"`
	NextBlock    uint64   `json:"nextBlock"`
	CheckedBytes int64    `json:"checkedBytes"`
	Found        int64    `json:"found"`
	Repaired     int64    `json:"repaired"`
	Left         int64    `json:"left"`
	Findings     []string `json:"findings"`
	Absent       []string `json:"absentNodes,omitempty"`
}

func newVolumeScrub(o *options) *cobra.Command {
	var (
		wait, show bool
		rate       string
	)
	cmd := &cobra.Command{
		Use:   "scrub NAME",
		Short: "Read and compare all replicas of a volume now, and repair what is damaged",
		Long: "Have every replica of a volume read all its blocks, compare them with their checksums and with the\n" +
			"other replicas, and repair what is damaged or differs from the majority. Every volume is scrubbed every\n" +
			"7 days by itself, slowly; this does it now, as fast as it goes beside the volume's own reads and writes,\n" +
			"or at --rate. With --status nothing is begun. With --wait the exit status is 1 when something could not\n" +
			"be repaired.",
		Example: "  trivet volume scrub db --wait\n  trivet volume scrub db --rate 50Mi\n  trivet volume scrub db --status",
		Args:    exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			rateBytes := int64(0)
			if rate != "" {
				var err error
				if rateBytes, err = parseSize(rate); err != nil {
					return err
				}
			}
			return o.call(cmd, func(ctx context.Context, c *client) error {
				st, err := beginScrub(ctx, c, args[0], show, &api.ScrubVolumeRequest{Name: args[0], RateBytes: rateBytes})
				if err == nil && wait {
					st, err = awaitScrub(ctx, c, st)
				}
				if err != nil {
					return err
				}
				if err := o.showScrub(cmd.OutOrStdout(), st); err != nil {
					return err
				}
				if wait && st.GetLeft() > 0 {
					return fmt.Errorf("%d blocks of %q could not be repaired", st.GetLeft(), st.GetName())
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait for its end, for --timeout at most")
	cmd.Flags().BoolVar(&show, "status", false, "show how far the newest pass has got")
	cmd.Flags().StringVar(&rate, "rate", "", "bytes per second that each replica reads, as 50Mi (default: no limit)")
	return cmd
}

func newVolumeVerify(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "verify NAME",
		Short: "Read and compare all replicas of a volume, and change nothing; exit status 1 if they differ",
		Long: "Have every replica of a volume read all its blocks, and compare checksums and content with each other.\n" +
			"Nothing is repaired. What differs is listed, and so is a node that took no part; then the exit status\n" +
			"is 1. The volume may be in use. --timeout bounds how long this waits; the comparison goes on in any case.",
		Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				st, err := c.ScrubVolume(ctx, &api.ScrubVolumeRequest{Name: args[0], Verify: true})
				if err == nil {
					st, err = awaitScrub(ctx, c, st)
				}
				if err != nil {
					return err
				}
				if err := o.showScrub(cmd.OutOrStdout(), st); err != nil {
					return err
				}
				return verdict(st)
			})
		},
	}
}

// verdict is nil when all replicas were compared and are alike.
func verdict(st *api.ScrubStatus) error {
	switch {
	case st.GetFound() > 0:
		return fmt.Errorf("%d blocks of %q are damaged or differ", st.GetFound(), st.GetName())
	case len(st.GetAbsent()) > 0:
		return fmt.Errorf("not all replicas of %q were compared: %s did not take part", st.GetName(),
			strings.Join(st.GetAbsent(), ", "))
	}
	return nil
}

func beginScrub(ctx context.Context, c *client, name string, show bool, r *api.ScrubVolumeRequest) (
	*api.ScrubStatus, error,
) {
	if show {
		return c.GetScrub(ctx, &api.VolumeRequest{Name: name})
	}
	return c.ScrubVolume(ctx, r)
}

// awaitScrub waits for the end of a pass.
func awaitScrub(ctx context.Context, c *client, begun *api.ScrubStatus) (*api.ScrubStatus, error) {
	last := begun
	err := await(ctx, "scrub of "+begun.GetName(), func(ctx context.Context) (string, error) {
		st, err := c.GetScrub(ctx, &api.VolumeRequest{Name: begun.GetId()})
		if err != nil {
			return "", err
		}
		switch {
		case st.GetPass() != begun.GetPass():
			return "", fmt.Errorf("pass %d was given up for pass %d", begun.GetPass(), st.GetPass())
		case st.GetRunning():
			return fmt.Sprintf("%s were checked so far", sizeText(st.GetCheckedBytes())), nil
		}
		last = st
		return "", nil
	})
	return last, err
}

func (o *options) showScrub(out io.Writer, st *api.ScrubStatus) error {
	view := scrubView{
		ID: st.GetId(), Name: st.GetName(), Pass: st.GetPass(), Running: st.GetRunning(), Verify: st.GetVerify(),
		RateBytes: st.GetRateBytes(), Started: st.GetStarted(), Ended: st.GetEnded(), LastScrub: st.GetLastScrub(),
		NextBlock: st.GetNextBlock(), CheckedBytes: st.GetCheckedBytes(), Found: st.GetFound(), Repaired: st.GetRepaired(),
		Left: st.GetLeft(), Findings: append([]string{}, st.GetFindings()...), Absent: st.GetAbsent(),
	}
	state := "ended " + view.Ended
	switch {
	case view.Pass == 0:
		state = "never"
	case view.Running:
		state = "running since " + view.Started
	}
	kind := "scrub"
	if view.Verify {
		kind = "verify"
	}
	err := o.show(out, view, table{
		header: []string{"NAME", "PASS", "KIND", "STATE", "CHECKED", "FOUND", "REPAIRED", "LEFT"},
		rows: [][]string{{
			view.Name, fmt.Sprint(view.Pass), kind, state, sizeText(view.CheckedBytes), fmt.Sprint(view.Found),
			fmt.Sprint(view.Repaired), fmt.Sprint(view.Left),
		}},
	})
	if err != nil || o.output == outputJSON {
		return err
	}
	for _, f := range view.Findings {
		fmt.Fprintf(out, "found: %s\n", f)
	}
	for _, n := range view.Absent {
		fmt.Fprintf(out, "absent: %s took no part in all of it\n", n)
	}
	return nil
}
