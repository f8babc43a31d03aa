package failover_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/failover"
)

// inBubble runs f with time that passes only when everybody waits.
func inBubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, f)
}

// died is a cluster of three nodes whose first one dies now, with a StatefulSet's pod on it.
func died(t *testing.T) *cluster {
	t.Helper()
	c := newCluster(t, "n1", "n2", "n3")
	c.volume("default", "db", "n1")
	c.pod("default", "db-0", "n1", "StatefulSet", "db")
	c.setAway("n1", true)
	return c
}

// moved is what is done for it, in this order.
var moved = []string{
	"fence vol-db from n1",
	"taints of n1: somebody/else csi.trivet.dev/failed-over",
	"in use on n1: []",
	"remove pod default/db-0",
	"remove attachment va-db",
}

// TestFailover is the whole story of a dead node: watched, fenced, then emptied, and welcome back.
func TestFailover(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		other := c.pod("default", "elsewhere", "n2", "StatefulSet", "other")
		c.volume("default", "other", "n2")
		f := c.controller()
		assert.Empty(t, c.watch(f, 10*time.Second), "it may come back")
		assert.Equal(t, moved, c.watch(f, 2*time.Second))
		assert.Empty(t, c.watch(f, time.Minute), "once")
		assert.Contains(t, c.pods, other.Namespace+"/"+other.Name)

		// Its server is back before its kubelet.
		c.setReady("n1", corev1.ConditionUnknown)
		c.setAway("n1", false)
		assert.Empty(t, c.watch(f, time.Minute))
		c.setReady("n1", corev1.ConditionTrue)
		assert.Equal(t, []string{"taints of n1: somebody/else"}, c.watch(f, 10*time.Second))
	})
}

// TestSilenceBeginsWithTheLastWord: a node has been silent since its kubelet's last renewal, not since its server was
// missed; but a server that is only replaced gets some time.
func TestSilenceBeginsWithTheLastWord(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		c.setAway("n1", false)
		f := c.controller()
		for range 3 {
			c.renew("n1")
			assert.Empty(t, c.watch(f, 10*time.Second))
		}
		assert.Empty(t, c.watch(f, 4*time.Second), "its server lives")
		c.setAway("n1", true)
		assert.Empty(t, c.watch(f, 4*time.Second))
		assert.Equal(t, moved, c.watch(f, 4*time.Second))
	})
}

// TestNothingBeforeTheFence: whatever else fails or works, no pod and no attachment goes, and no word is said of
// volumes in use, before the fence of the volume is committed.
func TestNothingBeforeTheFence(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		c.fenceErr["vol-db"] = fmt.Errorf("no quorum: %w", trivet.ErrUnavailable)
		f := c.controller()
		for _, did := range c.watch(f, time.Minute) {
			require.Equal(t, "no fence vol-db", did)
		}
		delete(c.fenceErr, "vol-db")
		assert.Equal(t, moved, c.watch(f, 2*time.Second))
	})
}

// TestEveryStepIsTriedAgain: each request that changes something fails once; the order stays, and in the end
// all is done.
func TestEveryStepIsTriedAgain(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		for _, step := range []string{
			"PATCH /api/v1/nodes/n1", "PATCH /api/v1/nodes/n1/status",
			"DELETE /api/v1/namespaces/default/pods/db-0", "DELETE /apis/storage.k8s.io/v1/volumeattachments/va-db",
		} {
			c := died(t)
			failed := 0
			c.refuse = func(method, path string) int {
				if method+" "+path == step && failed < 2 {
					failed++
					return http.StatusForbidden
				}
				return 0
			}
			assert.Equal(t, moved, c.watch(c.controller(), 30*time.Second), step)
			assert.Equal(t, 2, failed, step)
		}
	})
}

// TestPodWithTwoVolumes: it is removed when both are fenced, not when one is.
func TestPodWithTwoVolumes(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		c.volume("default", "log", "n1")
		c.pod("default", "db-0", "n1", "StatefulSet", "db", "log")
		c.fenceErr["vol-log"] = trivet.ErrUnavailable
		f := c.controller()
		did := c.watch(f, 20*time.Second)
		assert.Contains(t, did, "fence vol-db from n1")
		assert.NotContains(t, strings.Join(did, "\n"), "remove")
		delete(c.fenceErr, "vol-log")
		assert.Equal(t, []string{
			"fence vol-log from n1", "in use on n1: []", "remove pod default/db-0", "remove attachment va-db",
			"remove attachment va-log",
		}, c.watch(f, 2*time.Second))
	})
}

func TestOptOut(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		c.namespace("still", "disabled")
		c.namespace("typo", "disable")
		c.namespace("said", "enabled")
		for _, ns := range []string{"still", "typo", "said"} {
			c.volume(ns, "of-"+ns, "n1")
			c.pod(ns, "pod-"+ns, "n1", "StatefulSet", "of-"+ns)
		}
		f := c.controller()
		did := c.watch(f, time.Minute)
		text := strings.Join(did, "\n")
		assert.Contains(t, did, "fence vol-db from n1")
		assert.Contains(t, did, "remove pod said/pod-said")
		for _, ns := range []string{"still", "typo"} { // nothing moves by a typing error
			assert.NotContains(t, text, "fence vol-of-"+ns)
			assert.NotContains(t, text, "remove pod "+ns)
			assert.NotContains(t, text, "remove attachment va-of-"+ns)
		}
		assert.Contains(t, text, "in use on n1: [kubernetes.io/csi/csi.trivet.dev^vol-of-still")
	})
}

// TestLeftAlone: what no controller makes again, and what belongs to the node, stays, with all that it uses.
func TestLeftAlone(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		for _, claim := range []string{"bare", "lone", "daemon", "agent", "shared", "first", "ended", "going"} {
			c.volume("default", claim, "n1")
		}
		c.pod("default", "bare", "n1", "", "bare", "shared")
		c.pod("default", "lone", "n1", "", "lone")
		c.pod("default", "daemon", "n1", "DaemonSet", "daemon")
		c.pod("default", "agent", "n1", "DaemonSet", "agent")
		c.pod("default", "above", "n1", "ReplicaSet", "first", "shared") // seen before the one that makes it stay
		c.pod("default", "chained", "n1", "ReplicaSet", "shared", "daemon")
		c.pod("default", "ended", "n1", "", "ended").Status.Phase = corev1.PodSucceeded
		now := metav1.Now()
		c.pod("default", "going", "n1", "", "going").DeletionTimestamp = &now
		did := c.watch(c.controller(), 14*time.Second)
		assert.Subset(t, did, []string{
			"fence vol-db from n1", "fence vol-ended from n1", "fence vol-going from n1",
			"remove pod default/db-0", "remove pod default/going",
			"remove attachment va-db", "remove attachment va-ended", "remove attachment va-going",
		})
		for _, alone := range []string{
			"vol-bare from", "vol-lone from", "vol-daemon from", "vol-agent from", "vol-shared from", "vol-first from",
			"pod default/chained", "pod default/above", "pod default/ended",
		} {
			assert.NotContains(t, strings.Join(did, "\n"), alone)
		}
	})
}

// TestEphemeralVolume: the claim of a generic ephemeral volume is named after its pod.
func TestEphemeralVolume(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		c.volume("default", "web-scratch", "n1")
		p := c.pod("default", "web", "n1", "ReplicaSet")
		p.Spec.Volumes = []corev1.Volume{{Name: "scratch", VolumeSource: corev1.VolumeSource{
			Ephemeral: &corev1.EphemeralVolumeSource{},
		}}}
		assert.Contains(t, c.watch(c.controller(), 14*time.Second), "remove pod default/web")
	})
}

// TestComesBack: a node that is heard of again, by either way, is left alone.
func TestComesBack(t *testing.T) {
	for name, back := range map[string]func(c *cluster){
		"its server renews its lease":  func(c *cluster) { c.setAway("n1", false) },
		"its kubelet renews its Lease": func(c *cluster) { c.renew("n1") },
		"the API server was away meanwhile": func(c *cluster) {
			c.refuse = func(string, string) int { return http.StatusServiceUnavailable }
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				c := died(t)
				f := c.controller()
				assert.Empty(t, c.watch(f, 8*time.Second))
				back(c)
				assert.Empty(t, c.watch(f, 0))
				c.refuse = nil
				c.setAway("n1", true)
				assert.Empty(t, c.watch(f, 8*time.Second), "it is watched from the beginning")
				assert.Equal(t, moved, c.watch(f, 4*time.Second))
			})
		})
	}
}

// TestComesBackAtTheFence: the catalogue refuses, and nothing is touched.
func TestComesBackAtTheFence(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		f := c.controller()
		c.fenceErr["vol-db"] = fmt.Errorf("it lives: %w", trivet.ErrInUse)
		assert.Equal(t, []string{"no fence vol-db"}, c.watch(f, 12*time.Second))
		c.setAway("n1", false)
		assert.Empty(t, c.watch(f, time.Minute))
	})
}

// TestKubeletLives: as long as the kubelet renews its Lease on a Ready node, it is only Trivet that is away, and
// its pods wait for it.
func TestKubeletLives(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		f := c.controller()
		for range 6 {
			assert.Empty(t, c.watch(f, 10*time.Second))
			c.renew("n1")
		}
		c.setReady("n1", corev1.ConditionFalse) // it says itself that it cannot run pods
		var did []string
		for range 3 {
			did = append(did, c.watch(f, 8*time.Second)...)
			c.renew("n1")
		}
		assert.Equal(t, moved, did)
	})
}

// TestRareRenewals: a kubelet that renews every 30 s is not dead after 12.
func TestRareRenewals(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		seconds := int32(120)
		c.leases["n1"].Spec.LeaseDurationSeconds = &seconds
		f := c.controller()
		assert.Empty(t, c.watch(f, 34*time.Second))
		assert.Equal(t, moved, c.watch(f, 2*time.Second))
	})
}

// TestOutOfService: an operator, or his machine, says that the node is off: that is not waited for, but the lease is.
func TestOutOfService(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		c.nodes["n1"].Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeOutOfService, Effect: corev1.TaintEffectNoExecute}}
		c.setAway("n1", false)
		f := c.controller()
		assert.Empty(t, c.watch(f, time.Minute), "its server lives")
		c.setAway("n1", true)
		did := c.watch(f, 0)
		assert.Contains(t, did, "remove pod default/db-0")
	})
}

// TestNodeObjectDeleted: the machine was taken out of Kubernetes.
func TestNodeObjectDeleted(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		delete(c.nodes, "n1")
		delete(c.leases, "n1")
		assert.Equal(t, []string{"fence vol-db from n1", "remove pod default/db-0", "remove attachment va-db"},
			c.watch(c.controller(), 14*time.Second))
	})
}

// TestMostAreAway: then something else is wrong, and nothing is moved.
func TestMostAreAway(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		c.setAway("n2", true)
		f := c.controller()
		assert.Empty(t, c.watch(f, time.Minute))
		c.setAway("n2", false)
		assert.Equal(t, moved, c.watch(f, 2*time.Second))
	})
}

// TestOnlyTheLeaderActs, and who becomes it has watched meanwhile.
func TestOnlyTheLeaderActs(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		c.leads = false
		f := c.controller()
		assert.Empty(t, c.watch(f, time.Minute))
		c.leads = true
		assert.Equal(t, moved, c.watch(f, 0), "at once")

		c.leads = false
		c.setAway("n1", false)
		assert.Empty(t, c.watch(f, time.Minute))
		c.leads = true
		assert.Equal(t, []string{"taints of n1: somebody/else"}, c.watch(f, 0), "whoever set the taint")
	})
}

// TestTwoControllers at once do what one does.
func TestTwoControllers(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		one, two := c.controller(), c.controller()
		for range 10 {
			done := make(chan error, 2)
			for _, f := range []*failover.Controller{one, two} {
				go func() { done <- f.Round(t.Context()) }()
			}
			for range 2 {
				if err := <-done; err != nil {
					require.ErrorIs(t, err, trivet.ErrPending, "one of two that change the node at once")
				}
			}
			<-time.After(2 * time.Second)
		}
		did := c.take()
		assert.ElementsMatch(t, moved, did)
		assert.Equal(t, moved[0], did[0])
	})
}

// TestAnotherPodOfThatName is not removed: it may run elsewhere by now.
func TestAnotherPodOfThatName(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := died(t)
		c.refuse = func(method, path string) int {
			if method == http.MethodDelete && strings.Contains(path, "/pods/") {
				c.pods["default/db-0"].UID = "another"
			}
			return 0
		}
		assert.NotContains(t, c.watch(c.controller(), 12*time.Second), "remove pod default/db-0")
	})
}

func TestConfig(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]failover.Config{
		"nothing": {}, "negative": {API: nil, Catalogue: &cluster{}, Leads: func() bool { return true }, After: -1},
	} {
		_, err := failover.New(cfg)
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
	}
}
