package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/node/blockdev"
	"github.com/trivet-csi/trivet/node/keeper"
)

const (
	// keeperSocket is where a keeper of its own unit or pod listens.
	keeperSocket = "/run/trivet-keeper/keeper.sock"

	// keeperAuto makes a server start a keeper of its own, in its run directory.
	keeperAuto = "auto"

	// keeperGCPercent and keeperMemory: a keeper is there for years and does next to nothing.
	keeperGCPercent = 20
	keeperMemory    = 16 << 20 // bytes, soft
)

func newKeeper(o *options) *cobra.Command {
	var (
		socket, logLevel string
		logJSON          bool
		watchdog         time.Duration
	)
	cmd := &cobra.Command{
		Use:   "keeper",
		Short: "Keep the kernel devices of volumes in place while their server restarts",
		Long: "Keep the kernel devices of volumes in place while `trivet server --keeper` on this machine restarts, is\n" +
			"upgraded or was killed: programs that use a volume see a pause. Run it beside the server, in a unit or\n" +
			"pod of its own, and do not restart it together with the server. It needs root and little else.",
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := newLogger(logLevel, logJSON)
			if err != nil {
				return err
			}
			return runKeeper(cmd.Context(), keeper.Config{
				Socket: socket, Watchdog: watchdog, Ender: blockdev.DeviceEnder{}, Logger: log,
			})
		},
	}
	cmd.PersistentFlags().StringVar(&socket, "socket", keeperSocket, "unix socket to listen on, for root alone")
	f := cmd.Flags()
	f.DurationVar(&watchdog, "watchdog", keeper.DefaultWatchdog,
		"abort a device that has had no server for this long: what waits for it gets an I/O error")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	f.BoolVar(&logJSON, "log-json", false, "log as JSON")
	cmd.AddCommand(newKeeperList(o, &socket))
	return cmd
}

func runKeeper(ctx context.Context, cfg keeper.Config) error {
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(keeperGCPercent)
	debug.SetMemoryLimit(keeperMemory)
	// Whoever is killed for memory, it should not be the one that all others can be restarted by. Needs
	// CAP_SYS_RESOURCE; without, it is one process among others.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil {
		cfg.Logger.Info("not protected from the out-of-memory killer", "err", err)
	}
	k, err := keeper.Open(cfg)
	if err != nil {
		return err
	}
	debug.FreeOSMemory() // what the start took
	cfg.Logger.Info("keeping", "socket", cfg.Socket, "watchdog", cfg.Watchdog)
	return k.Serve(ctx)
}

// keptView is a device that a keeper has.
type keptView struct {
	Volume      string `json:"volume"`
	Server      string `json:"server"` // serving | starting | none
	AwaySeconds int64  `json:"awaySeconds"`
}

func newKeeperList(o *options, socket *string) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the devices that a keeper has, and since when one has been without a server",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := keeper.NewClient(*socket, nil, slog.New(slog.DiscardHandler))
			defer c.Close()
			entries, err := c.List()
			if err != nil {
				return err
			}
			views := make([]keptView, 0, len(entries))
			t := table{header: []string{"VOLUME", "SERVER", "AWAY"}}
			for i := range entries {
				v := keptOf(&entries[i])
				views = append(views, v)
				t.rows = append(t.rows, []string{v.Volume, v.Server, strconv.FormatInt(v.AwaySeconds, 10) + "s"})
			}
			return o.show(cmd.OutOrStdout(), views, t)
		},
	}
}

func keptOf(e *keeper.Entry) keptView {
	v := keptView{Volume: e.Name, Server: "none", AwaySeconds: int64(e.Away / time.Second)}
	switch {
	case e.Served:
		v.Server = "serving"
	case e.Claimed:
		v.Server = "starting"
	}
	return v
}

// keeperOf returns the socket of the keeper that a server with that run directory uses, and how to start
// one; "" if it uses none.
func keeperOf(flag, runDir string) (socket string, start func() error, err error) {
	if flag != keeperAuto {
		return flag, nil, nil
	}
	exe, err := os.Executable()
	if err != nil {
		return "", nil, fmt.Errorf("--keeper=%s: %w", keeperAuto, err)
	}
	if runDir, err = filepath.Abs(runDir); err != nil {
		return "", nil, fmt.Errorf("--keeper=%s: %w", keeperAuto, err)
	}
	socket = filepath.Join(runDir, "keeper", "keeper.sock")
	return socket, func() error {
		return keeper.Spawn(exe, []string{"keeper", "--socket", socket}, socket)
	}, nil
}
