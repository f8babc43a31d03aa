package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/trivet-csi/trivet/internal/stage"
)

const (
	// metricsVolumesMax bounds the volumes, and so the series, that one scrape returns: 256 volumes with all
	// their stages are some 80 000 lines. Beyond it the first ones by ID are shown, and how many are not.
	metricsVolumesMax = 256

	metricsScrapesMax = 4 // at a time
	metricsTimeout    = 10 * time.Second
)

// metricsServer answers GET /metrics over plain HTTP.
type metricsServer struct {
	http     *http.Server
	listener net.Listener
}

// openMetrics listens if there is an address. What is served is made anew at each scrape from what is open at
// that moment, so a volume that is gone disappears at once.
func (s *Server) openMetrics(ctx context.Context) error {
	if s.cfg.MetricsAddr == "" {
		return nil
	}
	registry := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), &collector{s},
	} {
		if err := registry.Register(c); err != nil {
			return fmt.Errorf("metrics: %w", err)
		}
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", s.cfg.MetricsAddr)
	if err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: metricsScrapesMax, Timeout: metricsTimeout, ErrorLog: scrapeLog{s},
	}))
	s.metrics = &metricsServer{listener: l, http: &http.Server{
		Handler: mux, ReadTimeout: metricsTimeout, WriteTimeout: 2 * metricsTimeout, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10,
	}}
	s.group.Go(func() error {
		if err := s.metrics.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("metrics: %w", err)
		}
		return nil
	})
	s.log.Info("serving metrics", "address", l.Addr().String())
	return nil
}

// MetricsAddress returns where GET /metrics is answered, or "".
func (s *Server) MetricsAddress() string {
	if s.metrics == nil {
		return ""
	}
	return s.metrics.listener.Addr().String()
}

func (m *metricsServer) close() error { return m.http.Close() }

// scrapeLog writes what goes wrong in a scrape to the server's log.
type scrapeLog struct{ s *Server }

// Println implements promhttp.Logger.
func (l scrapeLog) Println(v ...any) {
	l.s.log.Warn("metrics were not complete", "err", fmt.Sprint(v...))
}

// collector makes the metrics of a server at each scrape.
type collector struct{ s *Server }

// Describe sends nothing: which series there are depends on what is open.
func (c *collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	c.node(out)
	c.peers(out)
	local := c.s.catalogue.Local()
	names := make(map[string]string)
	for _, v := range local.Volumes() {
		names[v.ID.String()] = v.Name
	}
	nameOf := func(id string) string { return cmp.Or(names[id], id) }

	all := c.s.stages.Volumes()
	slices.SortFunc(all, func(a, b *stage.Volume) int { return cmp.Compare(a.ID(), b.ID()) })
	shown := all[:min(len(all), metricsVolumesMax)]
	gauge(out, descOmitted, float64(len(all)-len(shown)))
	for _, v := range shown {
		name := nameOf(v.ID().String())
		c.volume(out, v, name)
		deviceMetrics(out, name, v.Device())
	}
	n, err := c.s.node()
	if err != nil {
		return // no member of a cluster yet
	}
	schedulerMetrics(out, n.Scheduler())
	holdMetrics(out, n.HoldTimes())
	for disk, st := range n.DiskSchedulers() {
		diskSchedulerMetrics(out, string(disk), st)
	}
	for _, v := range shown {
		name := nameOf(v.ID().String())
		if limits, ok := n.Limits(v.ID()); ok {
			limitMetrics(out, name, limits)
		}
		if st, ok := n.CacheStats(v.ID()); ok && st.Bytes > 0 {
			cacheMetrics(out, name, &st)
		}
		if used, ok := n.OverlayBytes(v.ID()); ok {
			gauge(out, descOverlay, float64(used), name)
		}
		if st, ok := n.ReplicaStatus(v.ID()); ok {
			replicaMetrics(out, name, &st)
		}
		if u, ok := n.Usage(v.ID()); ok {
			usageMetrics(out, name, &u)
		}
		if st, ok := n.Integrity(v.ID()); ok {
			integrityMetrics(out, name, st)
		}
	}
}
