package stage_test

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/trivet-csi/trivet/internal/stage"
)

// seen makes a Summary of n requests a second of seconds each, in a window of one second.
func seen(s stage.Stage, node string, n, seconds float64) stage.Summary {
	return stage.Summary{
		Stage: s.String(), Node: node, Count: uint64(n), ArrivalRate: n, DepartureRate: n, Mean: seconds, Little: n * seconds,
		Concurrency: n * seconds, Bytes: uint64(n) * 4096,
	}
}

func at(node string, s ...stage.Summary) stage.Window {
	return stage.Window{Node: node, Seconds: 1, Stages: s}
}

type explainCase struct {
	name         string
	windows      []stage.Window
	params       map[string]string
	stage, node  string
	reason, what string // parts of reason and advice
}

func explainCases() []explainCase {
	return []explainCase{
		{name: "nothing seen", reason: "only 0 requests"},
		{
			name:    "a handful",
			windows: []stage.Window{at("a", seen(stage.Write, "a", 19, 1))}, reason: "only 19 requests",
		},
		{
			name: "the user is slow", windows: []stage.Window{
				at("a", seen(stage.Write, "a", 100, 0.001), seen(stage.LeaderLog, "a", 100, 0.0009)),
			},
			reason: "0.10 requests were under way", what: "more requests at a time",
		},
		{
			name: "limit of all requests", windows: []stage.Window{
				at("a", seen(stage.Read, "a", 50, 0.08), seen(stage.Write, "a", 49, 0.08), seen(stage.Throttle, "a", 99, 0.05)),
			},
			params: map[string]string{"iopsLimit": "100", "bandwidthLimit": "104857600", "readIopsLimit": "400"},
			stage:  "throttle", node: "a", reason: "99% of iopsLimit=100", what: "trivet volume set v iopsLimit=MORE",
		},
		{
			name: "limit of read bytes", windows: []stage.Window{
				at("a", seen(stage.Read, "a", 100, 0.08), seen(stage.Throttle, "a", 100, 0.05)),
			},
			params: map[string]string{"iopsLimit": "1000", "readBandwidthLimit": "409600"},
			stage:  "throttle", node: "a", reason: "100% of readBandwidthLimit=409600", what: "readBandwidthLimit=MORE",
		},
		{
			name: "other volumes", windows: []stage.Window{
				at("a", seen(stage.Write, "a", 100, 0.08), seen(stage.Scheduler, "a", 100, 0.05)),
			},
			stage: "scheduler", node: "a", reason: "62% of the time", what: "priority=MORE",
		},
		{
			name: "other volumes of the leader's disk", windows: []stage.Window{
				at("a", seen(stage.Write, "a", 100, 0.08)), at("b", seen(stage.DiskTurn, "b", 100, 0.05)),
			},
			stage: "disk_turn", node: "b", reason: "the same disk of node b", what: "priority=MORE",
		},
		{
			name: "leader's disk, with a queue before it", windows: []stage.Window{
				at("a", seen(stage.Write, "a", 1000, 0.02), seen(stage.Replication, "a", 1000, 0.02)),
				at("b", seen(stage.Queue, "b", 1000, 0.012), seen(stage.LeaderLog, "b", 100, 0.05),
					seen(stage.Network, "b", 200, 0.004), seen(stage.Apply, "b", 100, 0.001)),
				at("c", seen(stage.FollowerLog, "c", 100, 0.003)),
			},
			stage: "leader_log", node: "b", reason: "wait in the queue before it", what: "the disk of b",
		},
		{
			name: "a follower's disk, not the network that it is seen through", windows: []stage.Window{
				at("a", seen(stage.Write, "a", 1000, 0.02), seen(stage.LeaderLog, "a", 100, 0.005),
					seen(stage.Network, "a", 200, 0.051)),
				at("c", seen(stage.FollowerLog, "c", 100, 0.05)), at("d", seen(stage.FollowerLog, "d", 100, 0.001)),
			},
			stage: "follower_log", node: "c", what: "trivet replica move v c",
		},
		{
			name: "the network", windows: []stage.Window{
				at("a", seen(stage.Write, "a", 1000, 0.02)),
				at("b", seen(stage.LeaderLog, "b", 100, 0.005), seen(stage.Network, "b", 200, 0.051)),
				at("c", seen(stage.FollowerLog, "c", 100, 0.004)),
			},
			stage: "network", node: "b", what: "trivet volume move-leader v a",
		},
		{
			name: "the engine", windows: []stage.Window{
				at("a", seen(stage.Write, "a", 1000, 0.02), seen(stage.LeaderLog, "a", 100, 0.005),
					seen(stage.Apply, "a", 100, 0.11)),
			},
			stage: "apply", node: "a", what: "engine of a",
		},
		{
			name: "reads from the engine", windows: []stage.Window{
				at("a", seen(stage.Read, "a", 1000, 0.02), seen(stage.Replication, "a", 1000, 0.019),
					seen(stage.ServeRead, "a", 1000, 0.018)),
			},
			stage: "serve_read", node: "a", what: "cacheSize",
		},
		{
			name: "the way to reads", windows: []stage.Window{
				at("a", seen(stage.Read, "a", 1000, 0.02), seen(stage.Replication, "a", 1000, 0.02)),
				at("b", seen(stage.ServeRead, "b", 1000, 0.001)),
			},
			stage: "network", node: "a", what: "replicas closer together",
		},
		{
			name: "the leader did not answer", windows: []stage.Window{at("a", seen(stage.Write, "a", 1000, 0.02))},
			reason: "did not answer",
		},
	}
}

func explainCacheCases() []explainCase {
	return []explainCase{
		{
			name: "writes answered from memory", windows: []stage.Window{
				at("a", seen(stage.Write, "a", 50000, 0.0001), seen(stage.Cache, "a", 50000, 0.0001),
					seen(stage.WriteBack, "a", 100, 0.1), seen(stage.LeaderLog, "a", 100, 0.09)),
			},
			params: map[string]string{"cacheMode": "writeBack"},
			stage:  "cache", node: "a", reason: "from the memory of node a", what: "nothing below",
		},
		{
			name: "no room in the cache", windows: []stage.Window{
				at("a", seen(stage.Write, "a", 1000, 0.02), seen(stage.Cache, "a", 1000, 0.02),
					seen(stage.CacheRoom, "a", 1000, 0.019), seen(stage.WriteBack, "a", 100, 0.1),
					seen(stage.LeaderLog, "a", 100, 0.09)),
			},
			params: map[string]string{"cacheMode": "writeBack"},
			stage:  "leader_log", node: "a", reason: "wait for room in the cache for 95%", what: "cacheSize=MORE",
		},
		{
			name: "flushes wait for write-backs", windows: []stage.Window{
				at("a", seen(stage.Write, "a", 1000, 0.001), seen(stage.Flush, "a", 1000, 0.01),
					seen(stage.WriteBack, "a", 1000, 0.009), seen(stage.Apply, "a", 1000, 0.009)),
			},
			params: map[string]string{"cacheMode": "writeBack"},
			stage:  "apply", node: "a", reason: "flushes wait for write-backs for 91%", what: "engine of a",
		},
		{
			name: "write-backs, and the leader did not answer", windows: []stage.Window{
				at("a", seen(stage.Write, "a", 1000, 0.02), seen(stage.CacheRoom, "a", 1000, 0.019),
					seen(stage.WriteBack, "a", 100, 0.1)),
			},
			params: map[string]string{"cacheMode": "writeBack"},
			stage:  "write_back", node: "a", reason: "did not answer", what: "cacheSize=MORE",
		},
		{
			name: "reads from memory", windows: []stage.Window{
				at("a", seen(stage.Read, "a", 50000, 0.0001), seen(stage.Cache, "a", 50000, 0.00009)),
			},
			stage: "cache", node: "a", what: "answered from the memory of a",
		},
		{
			name: "reads that miss", windows: []stage.Window{{
				Node: "a", Cache: &stage.CacheSummary{Hits: 1, Misses: 3}, Stages: []stage.Summary{
					seen(stage.Read, "a", 1000, 0.02), seen(stage.Replication, "a", 1000, 0.019),
					seen(stage.ServeRead, "a", 1000, 0.018),
				},
			}},
			stage: "serve_read", node: "a", reason: "25% of the blocks", what: "cacheSize",
		},
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	for _, tc := range append(explainCases(), explainCacheCases()...) {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			got := stage.Explain(stage.Input{Name: "v", Params: tc.params, Attached: "a", Windows: tc.windows})
			assert.Equal(t, tc.stage, got.Stage, "%+v", got)
			assert.Equal(t, tc.node, got.Node, "%+v", got)
			assert.Contains(t, got.Reason, tc.reason)
			assert.Contains(t, got.Advice, tc.what)
		})
	}
}
