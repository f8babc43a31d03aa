package server

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/iothrottle"
	"github.com/trivet-csi/trivet/replication"
)

// The metrics; docs/metrics.md says how to use them. Names and labels are an interface: they stay.
var (
	descNode    = desc("trivet_node_info", "1, with what this server is.", "node", "zone", "version")
	descOmitted = desc("trivet_metrics_omitted_volumes", "Volumes served here that are not in this scrape.")
	descMember  = desc("trivet_node_member", "1 if this server is a member of a cluster.")
	descMetaRot = desc("trivet_catalogue_damaged_entries",
		"Entries of this server's log of the catalogue that are damaged and wait for another server's copy.")
	descMetaLead = desc("trivet_catalogue_leader", "1 if this server leads the catalogue.")
	descRevision = desc("trivet_catalogue_revision", "Changes of the catalogue as known here.")
	descDiskSize = desc("trivet_disk_size_bytes", "Size of the filesystem of a disk.", "disk", "path")
	descDiskFree = desc("trivet_disk_free_bytes", "What volumes may still use of a disk.", "disk", "path")

	descWindow   = desc("trivet_scheduler_window", "Requests that volumes here may have under way while others wait.")
	descInSched  = desc("trivet_scheduler_inside", "Requests of volumes attached here that are under way.")
	descWaiting  = desc("trivet_scheduler_waiting", "Requests that wait for other volumes.")
	descCapacity = desc("trivet_scheduler_capacity", "Requests per second that were done while others waited; 0 = never.")

	descDiskWindow = desc("trivet_disk_scheduler_window", "Requests that a disk may have under way while others wait.",
		"disk")
	descDiskInside   = desc("trivet_disk_scheduler_inside", "Requests, and background work, under way on a disk.", "disk")
	descDiskWaiting  = desc("trivet_disk_scheduler_waiting", "Requests and background work that wait for a disk.", "disk")
	descDiskCapacity = desc("trivet_disk_scheduler_capacity",
		"Requests per second that a disk did while others waited; 0 = never.", "disk")

	descConns    = desc("trivet_peer_connections", "Connections with other nodes.", "direction")
	descSent     = desc("trivet_peer_sent_bytes_total", "Bytes sent to other nodes.")
	descReceived = desc("trivet_peer_received_bytes_total", "Bytes received from other nodes.")
	descDials    = desc("trivet_peer_dial_failures_total", "Failed attempts to reach other nodes.")
	descTimeouts = desc("trivet_peer_timeouts_total", "Connections found dead.")

	descOps    = desc("trivet_volume_requests_total", "Requests answered on this node.", "volume", "op")
	descBytes  = desc("trivet_volume_bytes_total", "Bytes read and written on this node.", "volume", "op")
	descTime   = desc("trivet_volume_request_seconds", "Time until requests were answered.", "volume", "op")
	descResent = desc("trivet_device_resent_requests_total", "Requests that the kernel sent again after a resume, as an "+
		"earlier process had read and not answered them: repeated, or refused with EIO.", "volume", "result")
	descLimit = desc("trivet_volume_limit", "Limits in force, per second; those that are absent are not listed.",
		"volume", "limit")

	descStage    = desc("trivet_stage_seconds", "Time of requests in a stage of the data path.", "volume", "stage")
	descSquares  = desc("trivet_stage_seconds_squared_total", "Sum of the squares of those times.", "volume", "stage")
	descMean     = desc("trivet_stage_mean_seconds", "Mean of those times since the volume is open.", "volume", "stage")
	descVariance = desc("trivet_stage_variance_seconds2", "Variance of those times since the volume is open.", "volume",
		"stage")
	descInside = desc("trivet_stage_inside", "Requests in a stage at this moment.", "volume", "stage")

	descCacheBlocks = desc("trivet_cache_read_blocks_total",
		"Blocks read that were in the cache (hit), or not (miss), by the eviction policy in force then.",
		"volume", "eviction", "result")
	descCacheBytes = desc("trivet_cache_bytes",
		"What is in the cache: dirty (acknowledged, not written back), clean; and its size.", "volume", "state")
	descCacheMode   = desc("trivet_cache_info", "1, with the mode in force.", "volume", "mode")
	descCacheWrites = desc("trivet_cache_writes_total", "Writes acknowledged from memory, in pieces of at most 64 KiB.",
		"volume")
	descCacheMerged = desc("trivet_cache_merged_writes_total", "Writes that were written back with a neighbour.", "volume")
	descCacheBacks  = desc("trivet_cache_write_backs_total", "Write-backs.", "volume")
	descCacheBack   = desc("trivet_cache_write_back_bytes_total", "Bytes written back.", "volume")
	descCacheAhead  = desc("trivet_cache_read_ahead_bytes_total", "Bytes read ahead.", "volume")
	descCacheHeld   = desc("trivet_cache_held_writes_total", "Writes slowed down as dirty blocks came near their limit "+
		"(delayed), and that waited for room (stalled).", "volume", "how")

	descCacheFlush = desc("trivet_cache_write_back_limit_bytes", "The longest write-back, at the moment.", "volume")
	descCacheDepth = desc("trivet_cache_write_back_depth", "Write-backs under way at most, at the moment.", "volume")
	descCacheReach = desc("trivet_cache_read_ahead_limit_bytes", "How far is read ahead at most, at the moment.", "volume")

	descOverlay = desc("trivet_overlay_bytes",
		"Memory of the overlay into which the journal of a volume that is read here was replayed.", "volume")

	descLeader  = desc("trivet_replica_leader", "1 if the replica here leads its group.", "volume")
	descTerm    = desc("trivet_replica_term", "Raft term of the replica here.", "volume")
	descCommit  = desc("trivet_replica_commit_index", "Last index known as committed here.", "volume")
	descApplied = desc("trivet_replica_applied_index", "Last index applied here.", "volume")
	descUsed    = desc("trivet_replica_used_bytes", "Space that the blocks of the replica take.", "volume")

	descScrubbed  = desc("trivet_scrub_bytes_total", "Bytes of the replica here that scrubs have read.", "volume")
	descDamage    = desc("trivet_blocks_damaged_total", "Blocks of the replica here found damaged or differing.", "volume")
	descRepaired  = desc("trivet_blocks_repaired_total", "Of them, those that were repaired.", "volume")
	descHopeless  = desc("trivet_blocks_lost_total", "Of them, those of which no replica has a good copy.", "volume")
	descElsewhere = desc("trivet_reads_elsewhere_total", "Reads answered with another replica's blocks.", "volume")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

func gauge(out chan<- prometheus.Metric, d *prometheus.Desc, x float64, labels ...string) {
	out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, x, labels...)
}

func counter(out chan<- prometheus.Metric, d *prometheus.Desc, x float64, labels ...string) {
	out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, x, labels...)
}

func flag(on bool) float64 {
	if on {
		return 1
	}
	return 0
}

func (c *collector) node(out chan<- prometheus.Metric) {
	cfg := &c.s.cfg
	zone := cfg.Zone
	if n, err := c.s.node(); err == nil {
		zone = n.Info().Zone
	}
	gauge(out, descNode, 1, string(cfg.Node), zone, cfg.Version)
	gauge(out, descMember, flag(c.s.catalogue.Joined()))
	gauge(out, descMetaLead, flag(c.s.catalogue.Leader() == cfg.Node))
	gauge(out, descMetaRot, float64(c.s.catalogue.Damaged()))
	local := c.s.catalogue.Local()
	gauge(out, descRevision, float64(local.Revision()))
	self, ok := local.Node(cfg.Node)
	if !ok {
		return
	}
	for _, d := range self.Disks {
		gauge(out, descDiskSize, float64(d.SizeBytes), string(d.ID), d.Path)
		gauge(out, descDiskFree, float64(d.FreeBytes), string(d.ID), d.Path)
	}
}

func (c *collector) peers(out chan<- prometheus.Metric) {
	if c.s.peers == nil {
		return
	}
	st := c.s.peers.Stats()
	gauge(out, descConns, float64(st.ConnsOutN), "out")
	gauge(out, descConns, float64(st.ConnsInN), "in")
	counter(out, descSent, float64(st.BytesSent))
	counter(out, descReceived, float64(st.BytesReceived))
	counter(out, descDials, float64(st.DialFailures))
	counter(out, descTimeouts, float64(st.Timeouts))
}

// volume writes the meters of one volume. Whole requests have a family of their own, by the name that people
// look for.
func (c *collector) volume(out chan<- prometheus.Metric, v *stage.Volume, name string) {
	stages, meters := v.Used()
	for i, m := range meters {
		t := m.Totals()
		below, all := t.Cumulative()
		buckets := make(map[float64]uint64, len(below))
		for j, bound := range stage.Bounds {
			buckets[bound.Seconds()] = below[j]
		}
		what, family := stages[i].String(), descStage
		switch stages[i] {
		case stage.Read, stage.Write, stage.Discard, stage.Flush:
			family = descTime
			counter(out, descOps, float64(t.LeftN), name, what)
			if stages[i] == stage.Read || stages[i] == stage.Write {
				counter(out, descBytes, float64(t.Bytes), name, what)
			}
		default:
		}
		out <- prometheus.MustNewConstHistogram(family, all, t.Sum.Seconds(), buckets, name, what)
		counter(out, descSquares, t.Squares, name, what)
		gauge(out, descMean, t.Mean().Seconds(), name, what)
		gauge(out, descVariance, t.Variance(), name, what)
		gauge(out, descInside, float64(m.Inside()), name, what)
	}
}

func schedulerMetrics(out chan<- prometheus.Metric, st iothrottle.SchedulerStats) {
	gauge(out, descWindow, st.Window)
	gauge(out, descInSched, st.Inside)
	gauge(out, descWaiting, float64(st.WaitingN))
	gauge(out, descCapacity, st.Capacity)
}

func diskSchedulerMetrics(out chan<- prometheus.Metric, disk string, st iothrottle.SchedulerStats) {
	gauge(out, descDiskWindow, st.Window, disk)
	gauge(out, descDiskInside, st.Inside, disk)
	gauge(out, descDiskWaiting, float64(st.WaitingN), disk)
	gauge(out, descDiskCapacity, st.Capacity, disk)
}

func limitMetrics(out chan<- prometheus.Metric, name string, l iothrottle.Limits) {
	for _, f := range []struct {
		label string
		value float64
	}{
		{"iops", float64(l.IOPS)},
		{"read_iops", float64(l.ReadIOPS)},
		{"write_iops", float64(l.WriteIOPS)},
		{"bytes", float64(l.BytesPerSec)},
		{"read_bytes", float64(l.ReadBytesPerSec)},
		{"write_bytes", float64(l.WriteBytesPerSec)},
		{"burst_seconds", float64(l.Burst / time.Second)},
	} {
		if f.value > 0 {
			gauge(out, descLimit, f.value, name, f.label)
		}
	}
}

func replicaMetrics(out chan<- prometheus.Metric, name string, st *replication.ReplicaStatus) {
	gauge(out, descLeader, flag(st.IsLeader), name)
	gauge(out, descTerm, float64(st.Term), name)
	gauge(out, descCommit, float64(st.Commit), name)
	gauge(out, descApplied, float64(st.Applied), name)
	if st.UsedBytes >= 0 {
		gauge(out, descUsed, float64(st.UsedBytes), name)
	}
}

func cacheMetrics(out chan<- prometheus.Metric, name string, s *cache.Stats) {
	gauge(out, descCacheMode, 1, name, string(s.Mode))
	gauge(out, descCacheBytes, float64(s.DirtyBytes), name, "dirty")
	gauge(out, descCacheBytes, float64(s.CleanBytes), name, "clean")
	gauge(out, descCacheBytes, float64(s.Bytes), name, "size")
	for i, e := range cache.Evictions() {
		if h := s.ByEviction[i]; h.Hits+h.Misses > 0 {
			counter(out, descCacheBlocks, float64(h.Hits), name, string(e), "hit")
			counter(out, descCacheBlocks, float64(h.Misses), name, string(e), "miss")
		}
	}
	counter(out, descCacheWrites, float64(s.Writes), name)
	counter(out, descCacheMerged, float64(s.Merged), name)
	counter(out, descCacheBacks, float64(s.WriteBacks), name)
	counter(out, descCacheBack, float64(s.WriteBackBytes), name)
	counter(out, descCacheAhead, float64(s.ReadAheadBlocks)*trivet.BlockSize, name)
	counter(out, descCacheHeld, float64(s.Delayed), name, "delayed")
	counter(out, descCacheHeld, float64(s.Stalled), name, "stalled")
	gauge(out, descCacheFlush, float64(s.FlushBytes), name)
	gauge(out, descCacheDepth, float64(s.FlushDepth), name)
	gauge(out, descCacheReach, float64(s.ReadAheadBytes), name)
}

func integrityMetrics(out chan<- prometheus.Metric, name string, st replication.IntegrityStats) {
	counter(out, descScrubbed, float64(st.CheckedBytes), name)
	counter(out, descDamage, float64(st.Found), name)
	counter(out, descRepaired, float64(st.Repaired), name)
	counter(out, descHopeless, float64(st.Failed), name)
	counter(out, descElsewhere, float64(st.Elsewhere), name)
}

// deviceMetrics says what the kernel sent again to the volume's device; nil = it has none here.
func deviceMetrics(out chan<- prometheus.Metric, name string, d *stage.DeviceSummary) {
	if d == nil || !d.Tells {
		return
	}
	counter(out, descResent, float64(d.Repeated), name, "repeated")
	counter(out, descResent, float64(d.Refused), name, "refused")
}
