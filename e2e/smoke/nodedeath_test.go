package smoke_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/e2e/lab"
)

// deathOfNode cuts the power of the node on which a StatefulSet's pod writes. It comes up elsewhere with all that it
// had synced, without anybody's help, long before Kubernetes by itself would notice (50 s) or detach (6 minutes).
// The node stays dead: this is the last step.
func deathOfNode(s *suite) {
	s.kubectl("apply", "-f", filepath.Join(deploy, "examples", "storageclass.yaml"))
	s.apply(fmt.Sprintf(`
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: survivor}
spec:
  serviceName: survivor
  replicas: 1
  selector: {matchLabels: {app: survivor}}
  template:
    metadata: {labels: {app: survivor}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: main
          image: %s
          imagePullPolicy: Never
          command: [sh, -c, %s]
          volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
    - metadata: {name: data}
      spec:
        storageClassName: trivet-r3
        accessModes: [ReadWriteOnce]
        resources: {requests: {storage: 256Mi}}
`, lab.BusyboxImage, strconv.Quote("i=$(cat /data/log 2>/dev/null | wc -l)\n"+strings.TrimPrefix(writing, "i=0\n"))))
	const pod = "survivor-0"
	s.await("the pod writes", func() error {
		if s.get("pod", pod, "{.status.phase}") != "Running" || s.kubectl("logs", pod, "--tail=1") == "" {
			return errors.New("no line yet")
		}
		return nil
	})
	before := s.written(pod)
	s.await("50 more synced lines", func() error {
		if now := s.written(pod); now < before+50 {
			return fmt.Errorf("%d lines", now)
		}
		return nil
	})
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
	got, err := strconv.Atoi(s.inPod(pod, "sh", "-c", "wc -l </data/log"))
	require.NoError(s.t, err)
	assert.GreaterOrEqual(s.t, got, lines, "no synced line is lost")
	assert.Equal(s.t, "0", s.inPod(pod, "sh", "-c", "awk '$1!=NR{n++} END{print n+0}' /data/log"), "in order")
	assert.Contains(s.t, s.get("node", victim, "{.spec.taints[*].key}"), "csi.trivet.dev/failed-over")
	for _, line := range strings.Split(s.kubectl("get", "volumeattachments", "-o",
		`jsonpath={range .items[*]}{.spec.nodeName}{"\n"}{end}`), "\n") {
		assert.NotEqual(s.t, victim, line, "attachments of the dead node")
	}
}
