package smoke_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// deathOfNode cuts the power of the node on which a StatefulSet's pod writes. It comes up elsewhere with all that it
// had synced, without anybody's help, long before Kubernetes by itself would notice (50 s) or detach (6 minutes).
// The node stays dead: this is the last step.
func deathOfNode(s *suite) {
	s.kubectl("apply", "-f", filepath.Join(deploy, "examples", "storageclass.yaml"))
	const pod = "survivor-0"
	s.statefulSet("survivor")
	victim, uid, lines := s.get("pod", pod, "{.spec.nodeName}"), s.get("pod", pod, "{.metadata.uid}"), s.written(pod)
	s.t.Logf("the pod is on %s; the controllers are on %s", victim, s.kubectl("get", "pods", "-n", namespace, "-l",
		"app.kubernetes.io/component=controller", "-o", "jsonpath={.items[*].spec.nodeName}"))
	began := time.Now()
	require.NoError(s.t, s.KillNode(s.t.Context(), victim))
	s.await("another pod of that name runs", func() error {
		out := s.get("pod", pod, "{.metadata.uid} {.status.phase} {.spec.nodeName}")
		now := strings.Fields(out)
		if len(now) != 3 || now[0] == uid || now[1] != "Running" {
			return fmt.Errorf("%s", out)
		}
		assert.NotEqual(s.t, victim, now[2])
		return nil
	})
	s.t.Logf("it ran elsewhere %.1f s after the death of %s", time.Since(began).Seconds(), victim)
	s.await("it goes on writing", func() error {
		if now := s.written(pod); now <= lines {
			return fmt.Errorf("line %d", now)
		}
		return nil
	})
	s.requireWholeLog(pod, lines)
	assert.Contains(s.t, s.get("node", victim, "{.spec.taints[*].key}"), "csi.trivet.dev/failed-over")
	for _, line := range strings.Split(s.kubectl("get", "volumeattachments", "-o",
		`jsonpath={range .items[*]}{.spec.nodeName}{"\n"}{end}`), "\n") {
		assert.NotEqual(s.t, victim, line, "attachments of the dead node")
	}
}
