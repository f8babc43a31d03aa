package smoke_test

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// awaitLines waits until a pod has synced n lines more than before.
func (s *suite) awaitLines(pod string, n int) (lines int) {
	s.t.Helper()
	before := -1
	s.await(fmt.Sprintf("%d more synced lines", n), func() error {
		if s.kubectl("logs", pod, "--tail=1") == "" {
			return errors.New("no line yet")
		}
		lines = s.written(pod)
		if before < 0 {
			before = lines
		}
		if lines < before+n {
			return fmt.Errorf("%d lines, %d before", lines, before)
		}
		return nil
	})
	return lines
}

// deletedWhileItWrites takes a pod away without grace in the middle of its writes.
func deletedWhileItWrites(s *suite) {
	nodes := s.Nodes()
	s.claim("abrupt", "trivet-r3", "Filesystem")
	s.pod("abrupt", nodes[0], "abrupt", writing)
	lines := s.awaitLines("abrupt", 50)
	s.kubectl("delete", "pod", "abrupt", "--grace-period=0", "--force")
	s.pod("reader", nodes[1], "abrupt", idle)
	s.requireWholeLog("reader", lines)
	s.deletePod("reader")
	s.kubectl("delete", "pvc/abrupt", "--timeout="+waitMax.String())
	s.requireTraceless()
}

// kubeletDies kills a node's kubelet, three times, under a pod that writes, with a claim on its way to that node.
func kubeletDies(s *suite) {
	node := s.Nodes()[0]
	s.claim("steady", "trivet-r3", "Filesystem")
	s.pod("steady", node, "steady", writing)
	uid := s.get("pod", "steady", "{.metadata.uid}")
	for round := range 3 {
		name := fmt.Sprintf("new-%d", round)
		s.claim(name, "trivet-r3", "Filesystem")
		s.podWithoutWaiting(name, node, name)
		require.NoError(s.t, s.KillDaemon(s.t.Context(), node, "kubelet"))
		s.awaitRunning(name)
		s.inPod(name, "sh", "-c", "echo kept >/data/word && sync")
		s.kubectl("delete", "pod", name, "--wait=false")
		require.NoError(s.t, s.KillDaemon(s.t.Context(), node, "kubelet"))
		s.awaitGone("pod", name)
		s.kubectl("delete", "pvc/"+name, "--timeout="+waitMax.String())
	}
	s.await("the kubelet answers", func() error {
		_, err := s.Kubectl(s.t.Context(), "logs", "steady", "--tail=1")
		return err
	})
	lines := s.awaitLines("steady", 20)
	require.NotContains(s.t, s.kubectl("logs", "steady"), "ERROR")
	assert.Equal(s.t, uid, s.get("pod", "steady", "{.metadata.uid}"))
	s.deletePod("steady")
	s.pod("reader", s.Nodes()[1], "steady", idle)
	s.requireWholeLog("reader", lines)
	s.deletePod("reader")
	s.kubectl("delete", "pvc/steady", "--timeout="+waitMax.String())
	s.requireTraceless()
}

// sourceGoesWhileRestored deletes a claim and its snapshot while another claim is being made from it.
func sourceGoesWhileRestored(s *suite) {
	nodes := s.Nodes()
	for round := range 3 {
		source, snapshot, restored := fmt.Sprintf("going-%d", round), fmt.Sprintf("of-going-%d", round), fmt.Sprintf("kept-%d", round)
		s.xfsClaim(source, "Filesystem")
		s.pod(source, nodes[0], source, idle)
		s.inPod(source, "sh", "-c", "dd if=/dev/urandom of=/data/file bs=64k count=64 && sync")
		want := s.inPod(source, "md5sum", "/data/file")
		s.snapshot(snapshot, source)
		s.awaitReadyToUse("volumesnapshot", snapshot)
		s.claimFrom(restored, xfsClass, "Filesystem", "512Mi", ofSnapshot+snapshot)
		s.podWithoutWaiting(restored, nodes[1], restored)
		s.kubectl("delete", "pod", source, "--wait=false", "--force")
		s.kubectl("delete", "pvc/"+source, "volumesnapshot/"+snapshot, "--wait=false")
		s.awaitGone("volumesnapshot", snapshot)
		s.awaitGone("pvc", source)
		// Kubernetes keeps a snapshot while a claim is made from it; were it gone before, the claim could not be made.
		s.awaitRunning(restored)
		assert.Equal(s.t, want, s.inPod(restored, "md5sum", "/data/file"))
		s.deletePod(restored)
		s.kubectl("delete", "pvc/"+restored, "--timeout="+waitMax.String())
	}
	s.awaitNoVolume()
	s.requireTraceless()
}

// apiServerAway has nobody reach the API server for a minute: pods go on, nothing is moved, and what is asked for
// afterwards is done.
func apiServerAway(s *suite) {
	nodes := s.Nodes()
	s.claim("steady", "trivet-r3", "Filesystem")
	s.pod("steady", nodes[0], "steady", writing)
	before := s.awaitLines("steady", 20)
	uid := s.get("pod", "steady", "{.metadata.uid}")
	resume, err := s.Pause("kube-apiserver")
	require.NoError(s.t, err)
	<-time.After(time.Minute)
	require.NoError(s.t, resume())
	s.await("the API server answers", func() error {
		_, err := s.Kubectl(s.t.Context(), "get", "--raw", "/readyz")
		return err
	})
	lines := s.awaitLines("steady", 20)
	s.t.Logf("%d lines before, %d after", before, lines)
	said := s.kubectl("logs", "steady")
	require.NotContains(s.t, said, "ERROR")
	assert.Less(s.t, longestPause(s.t, said), 30.0, "it went on meanwhile")
	assert.Equal(s.t, uid, s.get("pod", "steady", "{.metadata.uid}"))
	for _, node := range nodes {
		assert.NotContains(s.t, s.get("node", node, "{.spec.taints[*].key}"), "failed-over", node)
	}
	s.claim("later", "trivet-r3", "Filesystem")
	s.pod("later", nodes[1], "later", idle)
	s.deletePod("later")
	s.deletePod("steady")
	s.pod("reader", nodes[2], "steady", idle)
	s.requireWholeLog("reader", lines)
	s.deletePod("reader")
	s.kubectl("delete", "pvc/steady", "pvc/later", "--timeout="+waitMax.String())
}

// killSidecars kills the containers of the controllers' pods, those that run.
func (s *suite) killSidecars() (killed int) {
	s.t.Helper()
	for line := range strings.Lines(s.kubectl("get", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=controller",
		"-o", `jsonpath={range .items[*]}{.metadata.name} {.spec.nodeName}{"\n"}{end}`)) {
		pod, node, _ := strings.Cut(strings.TrimSpace(line), " ")
		for _, name := range []string{"csi-controller", "csi-provisioner", "csi-attacher", "csi-resizer", "csi-snapshotter"} {
			if s.KillContainer(s.t.Context(), node, namespace, pod, name) == nil {
				killed++
			}
		}
	}
	return killed
}

// sidecarsDie kills every sidecar, and the controller service, in the middle of calls, three times.
func sidecarsDie(s *suite) {
	nodes := s.Nodes()
	killed := 0
	for round := range 3 {
		name, snapshot := fmt.Sprintf("round-%d", round), fmt.Sprintf("of-round-%d", round)
		s.xfsClaim(name, "Filesystem")
		s.podWithoutWaiting(name, nodes[round%3], name)
		killed += s.killSidecars()
		s.awaitRunning(name)
		s.inPod(name, "sh", "-c", "echo kept >/data/word && sync")
		s.snapshot(snapshot, name)
		s.kubectl("patch", "pvc", name, "-p", `{"spec":{"resources":{"requests":{"storage":"1Gi"}}}}`)
		killed += s.killSidecars()
		s.awaitReadyToUse("volumesnapshot", snapshot)
		s.kubectl("delete", "pod", name, "--wait=false")
		s.kubectl("delete", "pvc/"+name, "volumesnapshot/"+snapshot, "--wait=false")
		killed += s.killSidecars()
		// The kubelet waits up to five minutes before it starts a container again that died so often. New pods begin anew.
		s.kubectl("delete", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=controller")
		s.kubectl("-n", namespace, "rollout", "status", "deployment/trivet-controller", "--timeout="+waitMax.String())
	}
	s.t.Logf("%d containers killed", killed)
	require.Greater(s.t, killed, 15)
	for _, kind := range []string{"pvc", "volumesnapshots", "volumesnapshotcontents", "pv", "volumeattachments"} {
		s.await("no "+kind+" is left", func() error {
			if out := s.kubectl("get", kind, "-A", "-o", "name"); out != "" {
				return errors.New(out)
			}
			return nil
		})
	}
	s.awaitNoVolume()
	s.requireTraceless()
}
