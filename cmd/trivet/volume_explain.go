package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

// reportView is what `trivet volume explain -o json` prints; times are in seconds.
type reportView struct {
	ID       string      `json:"id"`
	Name     string      `json:"name"`
	Attached string      `json:"attachedNode,omitempty"`
	Seconds  float64     `json:"windowSeconds"`
	Limiting string      `json:"limitingStage,omitempty"`
	Reason   string      `json:"reason"`
	Advice   string      `json:"advice,omitempty"`
	Silent   []string    `json:"silentNodes,omitempty"`
	Stages   []stageView `json:"stages"`
	Cache    *cacheView  `json:"cache,omitempty"`

	Devices []deviceView `json:"devices,omitempty"`
}

type stageView struct {
	Stage         string  `json:"stage"`
	Node          string  `json:"node"`
	Count         uint64  `json:"count"`
	ArrivalRate   float64 `json:"arrivalRate"`
	DepartureRate float64 `json:"departureRate"`
	ServiceRate   float64 `json:"serviceRate"`
	Utilisation   float64 `json:"utilisation"`
	Mean          float64 `json:"mean"`
	StdDev        float64 `json:"standardDeviation"`
	P50           float64 `json:"p50"`
	P99           float64 `json:"p99"`
	Max           float64 `json:"max"`
	Concurrency   float64 `json:"concurrency"`
	Little        float64 `json:"littleConcurrency"`
	Samples       int64   `json:"samples"`
}

func newVolumeExplain(o *options) *cobra.Command {
	var (
		window time.Duration
		watch  bool
	)
	cmd := &cobra.Command{
		Use:   "explain NAME",
		Short: "Watch a volume for a moment and say where its requests spend their time, and what would help",
		Long: "Watch a volume on every node that serves it, and print for each stage of its data path how many requests\n" +
			"came and went a second, what it could do (SERVICE), for how much of the time it was in use (USED), the time\n" +
			"that requests spent in it, and how many were in it at a time: sampled (INSIDE) and by Little's law (L=λW).\n" +
			"Where those two differ, requests are stuck or the load changed meanwhile. docs/metrics.md explains the stages.",
		Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.dial(o.server)
			if err != nil {
				return err
			}
			defer c.conn.Close()
			stream, err := c.ExplainVolume(cmd.Context(), &api.ExplainVolumeRequest{
				Name: args[0], WindowMilliseconds: window.Milliseconds(),
			})
			if err != nil {
				return err
			}
			for {
				r, err := stream.Recv()
				if watch && (errors.Is(err, io.EOF) || cmd.Context().Err() != nil) {
					return nil // interrupted, as intended
				}
				if err != nil {
					return err
				}
				if err := o.showReport(cmd, r); err != nil || !watch {
					return err
				}
			}
		},
	}
	cmd.Flags().DurationVar(&window, "for", 2*time.Second, "how long to watch, at most 1m")
	cmd.Flags().BoolVar(&watch, "watch", false, "go on until interrupted")
	return cmd
}

func (o *options) showReport(cmd *cobra.Command, r *api.VolumeReport) error {
	view := reportOf(r)
	out := cmd.OutOrStdout()
	if err := o.show(out, view, reportTable(&view)); err != nil || o.output == outputJSON {
		return err
	}
	if view.Cache != nil {
		fmt.Fprintln(out)
		if err := o.show(out, view.Cache, cacheTable(view.Cache)); err != nil {
			return err
		}
	}
	fmt.Fprintln(out)
	for i := range view.Devices {
		fmt.Fprint(out, view.Devices[i].text())
	}
	limit := "nothing here"
	if view.Limiting != "" {
		limit = view.Limiting
	}
	fmt.Fprintf(out, "limited by: %s\n  %s\n", limit, view.Reason)
	if view.Advice != "" {
		fmt.Fprintf(out, "advice: %s\n", view.Advice)
	}
	for _, node := range view.Silent {
		fmt.Fprintf(out, "no answer from %s: what happens there is not in the table\n", node)
	}
	return nil
}

func reportOf(r *api.VolumeReport) reportView {
	view := reportView{
		ID: r.GetId(), Name: r.GetName(), Attached: r.GetAttachedNode(), Seconds: r.GetWindowSeconds(),
		Limiting: r.GetLimitingStage(), Reason: r.GetReason(), Advice: r.GetAdvice(), Silent: r.GetSilent(),
		Stages: []stageView{},
	}
	for _, s := range r.GetStages() {
		view.Stages = append(view.Stages, stageView{
			Stage: s.GetStage(), Node: s.GetNode(), Count: s.GetCount(), ArrivalRate: s.GetArrivalRate(),
			DepartureRate: s.GetDepartureRate(), ServiceRate: s.GetServiceRate(), Utilisation: s.GetUtilisation(),
			Mean: s.GetMean(), StdDev: s.GetStandardDeviation(), P50: s.GetP50(), P99: s.GetP99(), Max: s.GetMax(),
			Concurrency: s.GetConcurrency(), Little: s.GetLittleConcurrency(), Samples: s.GetSamples(),
		})
	}
	view.Cache = cacheOf(r.GetCache())
	for _, d := range r.GetDevices() {
		view.Devices = append(view.Devices, deviceView{
			Node: d.GetNode(), Path: d.GetPath(), Tells: d.GetTells(), Repeated: d.GetRepeated(), Refused: d.GetRefused(),
		})
	}
	return view
}

func reportTable(v *reportView) table {
	t := table{header: []string{
		"STAGE", "NODE", "IN/S", "OUT/S", "SERVICE/S", "USED", "MEAN", "SD", "P50", "P99", "MAX", "INSIDE", "L=λW",
	}}
	for i := range v.Stages {
		s := &v.Stages[i]
		if s.Count == 0 && s.Concurrency == 0 {
			continue // not used in this window
		}
		t.rows = append(t.rows, []string{
			s.Stage, s.Node, rateText(s.ArrivalRate), rateText(s.DepartureRate), rateText(s.ServiceRate),
			fmt.Sprintf("%.0f%%", 100*s.Utilisation), timeText(s.Mean), timeText(s.StdDev), timeText(s.P50), timeText(s.P99),
			timeText(s.Max), fmt.Sprintf("%.2f", s.Concurrency), fmt.Sprintf("%.2f", s.Little),
		})
	}
	return t
}

func rateText(perSecond float64) string {
	if perSecond >= 100 {
		return fmt.Sprintf("%.0f", perSecond)
	}
	return fmt.Sprintf("%.1f", perSecond)
}

// timeText prints seconds with three digits.
func timeText(seconds float64) string {
	switch {
	case seconds >= 1:
		return fmt.Sprintf("%.3gs", seconds)
	case seconds >= 1e-3:
		return fmt.Sprintf("%.3gms", seconds*1e3)
	}
	return fmt.Sprintf("%.3gµs", seconds*1e6)
}
