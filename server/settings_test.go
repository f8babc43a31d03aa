package server_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/testutil"
	"github.com/trivet-csi/trivet/replication/transport"
	"github.com/trivet-csi/trivet/server"
)

// startMeasured starts three servers that answer GET /metrics.
func startMeasured(t *testing.T) *testutil.Cluster {
	t.Helper()
	hub := transport.NewMemory(1)
	t.Cleanup(func() { require.NoError(t, hub.Close()) })
	return testutil.StartCluster(t, 3, func(_ int, cfg *server.Config) {
		cfg.Network, cfg.MetricsAddr = hub.Node(cfg.Node), "127.0.0.1:0"
	})
}

// scrape returns the metrics of server i, in the text format, by name and labels.
func scrape(t *testing.T, c *testutil.Cluster, i int) map[string]float64 {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+c.Metrics(i)+"/metrics", nil)
	require.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, resp.StatusCode, string(body))
	metrics := map[string]float64{}
	for line := range strings.Lines(string(body)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "#") {
			continue
		}
		at := strings.LastIndexByte(line, ' ')
		metrics[line[:at]], err = strconv.ParseFloat(line[at+1:], 64)
		require.NoError(t, err, line)
	}
	return metrics
}

func set(t *testing.T, c *testutil.Cluster, name string, params ...string) {
	t.Helper()
	patch := map[string]string{}
	for i := 0; i < len(params); i += 2 {
		patch[params[i]] = params[i+1]
	}
	require.NoError(t, again(t, func() error {
		_, err := c.Admin(2).SetVolume(t.Context(), &api.SetVolumeRequest{Name: name, Parameters: patch})
		return err
	}))
}

// write4K writes single blocks, one after the other, until stop is called.
func write4K(client *nbdClient) (stop func() error) {
	var quit atomic.Bool
	var wg sync.WaitGroup
	var err error
	wg.Go(func() {
		for i := int64(0); err == nil && !quit.Load(); i++ {
			err = client.write(pattern('w'), i%1024*trivet.BlockSize)
		}
	})
	return func() error { quit.Store(true); wg.Wait(); return err }
}

const (
	passed = `trivet_stage_seconds_count{stage="throttle",volume="v"}`
	held   = `trivet_stage_inside{stage="throttle",volume="v"}`
)

// TestSettingsFollowLive changes limits under a writer over NBD, on a node that is not asked, and looks at what
// the throttle lets through: nothing but the first request while the limit is a byte a second, and then, lifted,
// whatever is written. Nothing here depends on how fast the machine is.
func TestSettingsFollowLive(t *testing.T) {
	c := startMeasured(t)
	create(t, c, "v")
	client, stopServing := serveNBD(t, c, 1, "v")
	stop := write4K(client)
	await := func(what string, cond func(m map[string]float64) bool) map[string]float64 {
		t.Helper()
		var m map[string]float64
		require.Eventually(t, func() bool { m = scrape(t, c, 1); return cond(m) }, time.Minute, 20*time.Millisecond, what)
		return m
	}
	await("the writer writes", func(m map[string]float64) bool { return m[passed] > 100 })

	set(t, c, "v", "bandwidthLimit", "1", "burst", "0")
	before, same := -1.0, 0
	m := await("the writer is held back", func(m map[string]float64) bool {
		if m[`trivet_volume_limit{limit="bytes",volume="v"}`] != 1 || m[held] != 1 || m[passed] != before {
			before, same = m[passed], 0
			return false
		}
		same++
		// The lines of one scrape are not of one moment, and a request that was let through may not have been counted yet.
		return same == 20
	})
	for _, priority := range []string{"10", "20"} { // other changes come and go
		set(t, c, "v", "priority", priority)
	}
	assert.InDelta(t, m[passed], scrape(t, c, 1)[passed], 0, "4096 bytes at one a second: nothing for an hour")

	_, err := c.Admin(0).SetVolume(t.Context(), &api.SetVolumeRequest{
		Name: "v", Parameters: map[string]string{"bandwidthLimit": "", "colour": "red"},
	})
	require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
	assert.InDelta(t, m[passed], scrape(t, c, 1)[passed], 0, "nothing is applied of a bad change")

	set(t, c, "v", "bandwidthLimit", "")
	m = await("the writer goes on", func(now map[string]float64) bool { return now[passed] > m[passed]+100 })
	assert.NotContains(t, m, `trivet_volume_limit{limit="bytes",volume="v"}`)

	set(t, c, "v", "writeIopsLimit", "20")
	await("a limit of writes", func(m map[string]float64) bool {
		return m[`trivet_volume_limit{limit="write_iops",volume="v"}`] == 20
	})
	// Of a window in which the disks were slower than that, it says so.
	require.EventuallyWithT(t, func(t2 *assert.CollectT) {
		report := explain(t.Context(), t2, c, "v", 2*time.Second)
		assert.Equal(t2, "throttle", report.GetLimitingStage(), "%v", report)
		assert.Contains(t2, report.GetAdvice(), "trivet volume set v writeIopsLimit=")
	}, 2*eventuallyTimeout, 20*time.Millisecond)
	v, err := c.Admin(0).GetVolume(t.Context(), &api.VolumeRequest{Name: "v"})
	require.NoError(t, err)
	assert.Equal(t, "20", v.GetParameters()["writeIopsLimit"])
	assert.Equal(t, "20", v.GetParameters()["priority"])
	set(t, c, "v", "writeIopsLimit", "")
	require.NoError(t, stop())
	stopServing()

	_, err = c.Admin(0).DeleteVolume(t.Context(), &api.VolumeRequest{Name: "v"})
	require.NoError(t, err)
	for i := range 3 {
		require.Eventually(t, func() bool {
			for series := range scrape(t, c, i) {
				if strings.Contains(series, `volume=`) {
					return false
				}
			}
			return true
		}, time.Minute, 20*time.Millisecond, "a volume that is gone disappears")
	}
}

// explain returns the first report about a volume.
func explain(ctx context.Context, t require.TestingT, c *testutil.Cluster, name string, window time.Duration,
) *api.VolumeReport {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Admin(0).ExplainVolume(ctx, &api.ExplainVolumeRequest{
		Name: name, WindowMilliseconds: window.Milliseconds(),
	})
	require.NoError(t, err)
	report, err := stream.Recv()
	require.NoError(t, err)
	return report
}

// TestExplainSeesEveryStage writes and reads over NBD on one node while another is asked: every stage reports,
// from the nodes that it is on, and the requests that are counted inside agree with Little's law.
func TestExplainSeesEveryStage(t *testing.T) {
	c := startMeasured(t)
	create(t, c, "v")
	client, stopServing := serveNBD(t, c, 1, "v")
	mustWrite(t, client, 1, 'a')
	require.Eventually(t, func() bool { return leaderOf(t, c, 0, "v") == 1 }, time.Minute, 50*time.Millisecond)
	stop := write4K(client)
	// A window is of no use in which a node was late, or a write took so long that it began or ended in another one.
	require.EventuallyWithT(t, func(t2 *assert.CollectT) {
		ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
		defer cancel()
		_, err := c.Admin(0).MoveLeader(ctx, &api.MoveLeaderRequest{Name: "v", Node: "node-1"}) // back, after an election
		require.NoError(t2, err)
		checkStages(t2, explain(t.Context(), t2, c, "v", 2*time.Second))
	}, 2*eventuallyTimeout, 20*time.Millisecond)
	require.NoError(t, stop())
	requireBlock(t, client, 1, 'w')
	m := scrape(t, c, 1)
	assert.InDelta(t, 1, m[`trivet_stage_seconds_count{stage="serve_read",volume="v"}`], 0)
	assert.InDelta(t, 1, m[`trivet_volume_requests_total{op="read",volume="v"}`], 0)
	assert.InDelta(t, trivet.BlockSize, m[`trivet_volume_bytes_total{op="read",volume="v"}`], 0)
	assert.InDelta(t, 1, m[`trivet_replica_leader{volume="v"}`], 0)
	assert.Positive(t, m[`trivet_stage_variance_seconds2{stage="apply",volume="v"}`])
	assert.InDelta(t, m[`trivet_volume_requests_total{op="write",volume="v"}`],
		m[`trivet_volume_request_seconds_bucket{op="write",volume="v",le="+Inf"}`], 0)
	assert.Contains(t, m, "trivet_scheduler_window")
	assert.InDelta(t, 1, m[fmt.Sprintf("trivet_node_info{node=%q,version=%q,zone=%q}", "node-1", "unknown", "")], 0)
	stopServing()

	for _, bad := range []int64{-1, 60_001} {
		stream, err := c.Admin(0).ExplainVolume(t.Context(), &api.ExplainVolumeRequest{Name: "v", WindowMilliseconds: bad})
		require.NoError(t, err)
		_, err = stream.Recv()
		require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
	}
	stream, err := c.Admin(0).ExplainVolume(t.Context(), &api.ExplainVolumeRequest{Name: "nobody"})
	require.NoError(t, err)
	_, err = stream.Recv()
	require.Equal(t, codes.NotFound, status.Code(err), "%v", err)
}

// checkStages looks at the report of a volume of three that node-1 writes and leads.
func checkStages(t *assert.CollectT, report *api.VolumeReport) {
	assert.Empty(t, report.GetSilent())
	assert.Equal(t, "node-1", report.GetAttachedNode())
	on := map[string][]string{}
	for _, s := range report.GetStages() {
		if s.GetCount() > 0 {
			on[s.GetStage()] = append(on[s.GetStage()], s.GetNode())
			assert.Positive(t, s.GetMean()+s.GetArrivalRate(), s.GetStage())
		}
		if s.GetStage() == "write" {
			assert.InDelta(t, s.GetLittleConcurrency(), s.GetConcurrency(), 0.3, "one writer: %v", s)
			assert.GreaterOrEqual(t, s.GetP99(), s.GetP50())
			assert.InDelta(t, s.GetArrivalRate(), s.GetDepartureRate(), 1)
		}
	}
	for _, stage := range []string{"write", "throttle", "scheduler", "replication", "queue", "leader_log", "network"} {
		assert.Equal(t, []string{"node-1"}, on[stage], stage)
	}
	assert.ElementsMatch(t, []string{"node-0", "node-2"}, on["follower_log"])
	assert.ElementsMatch(t, []string{"node-0", "node-1", "node-2"}, on["apply"])
	assert.NotEmpty(t, report.GetReason())
}

// TestMetricsAnswerNothingElse: one path, one method.
func TestMetricsAnswerNothingElse(t *testing.T) {
	c := testutil.StartCluster(t, 1, func(_ int, cfg *server.Config) { cfg.MetricsAddr = "127.0.0.1:0" })
	for _, r := range []struct {
		method, path string
		want         int
	}{
		{http.MethodGet, "/metrics", http.StatusOK},
		{http.MethodPost, "/metrics", http.StatusMethodNotAllowed},
		{http.MethodGet, "/", http.StatusNotFound},
		{http.MethodGet, "/debug/pprof/", http.StatusNotFound},
	} {
		req, err := http.NewRequestWithContext(t.Context(), r.method, "http://"+c.Metrics(0)+r.path, nil)
		require.NoError(t, err)
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		resp.Body.Close()
		assert.Equal(t, r.want, resp.StatusCode, "%s %s", r.method, r.path)
	}
	assert.Contains(t, scrape(t, c, 0), "trivet_catalogue_leader")
}
