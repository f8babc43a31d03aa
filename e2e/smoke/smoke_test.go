package smoke_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/e2e/lab"
)

func TestSmoke(t *testing.T) {
	s := start(t)
	s.step("install", install)
	s.step("data follows the pod to another node", dataFollowsThePod)
	s.step("reclaim Delete leaves nothing", reclaimDelete)
	s.step("reclaim Retain keeps", reclaimRetain)
	s.step("limits hold", limitsHold)
	s.step("death of a server", deathOfServer)
	s.step("all pods restart with new addresses", allPodsRestart)
	s.step("the examples", examples)
	s.step("nothing is left", nothingIsLeft)
	s.step("death of a node", deathOfNode)
}

// install applies deploy/ as it stands.
func install(s *suite) {
	s.kubectl("apply", "-k", deploy)
	wait := "--timeout=" + waitMax.String()
	s.kubectl("-n", namespace, "wait", "--for=condition=complete", "job/trivet-init", wait)
	s.kubectl("-n", namespace, "wait", "--for=jsonpath={.status.numberReady}=3", "daemonset/trivet-node", wait)
	s.kubectl("-n", namespace, "rollout", "status", "deployment/trivet-controller", wait)
	nodes := s.awaitUp()
	for i, name := range s.Nodes() {
		assert.Equal(s.t, fmt.Sprintf("z%d", i+1), nodes[name].Zone, "zone of %s, from its label", name)
		s.await("kubelet of "+name+" has the driver", func() error {
			if got := s.get("csinode", name, "{.spec.drivers[*].name}"); got != "csi.trivet.dev" {
				return fmt.Errorf("drivers %q", got)
			}
			return nil
		})
	}
	s.requireNoRestarts()
	// Again: nothing changes, and no second cluster is born.
	s.kubectl("apply", "-k", deploy)
	s.kubectl("apply", "-f", filepath.Join(deploy, "examples", "storageclass.yaml"))
}

// The claim that the first steps share.
const firstClaim = "first"

func dataFollowsThePod(s *suite) {
	nodes := s.Nodes()
	s.claim(firstClaim, "trivet-r3", "Filesystem")
	assert.Equal(s.t, "Pending", s.get("pvc", firstClaim, "{.status.phase}"), "until a pod needs it")
	s.pod("writer", nodes[0], firstClaim, idle)
	pv := s.bound(firstClaim)
	s.inPod("writer", "sh", "-c", "dd if=/dev/urandom of=/data/file bs=64k count=128 && sync && md5sum /data/file >/data/sum")
	want := s.inPod("writer", "cat", "/data/sum")
	s.inPod("writer", "sync")
	assert.Equal(s.t, "ext4", s.inPod("writer", "sh", "-c", "grep ' /data ' /proc/mounts | cut -d' ' -f3"))

	var v volume
	require.NoError(s.t, s.ask(&v, "volume", "show", pv))
	assert.Equal(s.t, nodes[0], v.Attached)
	assert.Len(s.t, v.Replicas, 3)

	s.deletePod("writer")
	s.pod("reader", nodes[1], firstClaim, idle)
	assert.Equal(s.t, want, s.inPod("reader", "cat", "/data/sum"))
	assert.Equal(s.t, want, s.inPod("reader", "md5sum", "/data/file"))
	s.deletePod("reader")
}

func reclaimDelete(s *suite) {
	pv := s.bound(firstClaim)
	s.kubectl("delete", "pvc", firstClaim, "--timeout="+waitMax.String())
	s.awaitGone("pv", pv)
	s.awaitNoVolume()
	assert.Empty(s.t, s.kubectl("get", "volumeattachments", "-o", "name"))
	s.requireTraceless()
}

func reclaimRetain(s *suite) {
	nodes := s.Nodes()
	s.apply(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: retained}
provisioner: csi.trivet.dev
reclaimPolicy: Retain
volumeBindingMode: WaitForFirstConsumer
parameters: {replicas: "3", csi.storage.k8s.io/fstype: xfs}
`)
	s.apply(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: kept}
spec:
  storageClassName: retained
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 512Mi}} # xfs wants 300 MiB
`)
	s.pod("keeper", nodes[2], "kept", idle)
	pv := s.bound("kept")
	handle := s.get("pv", pv, "{.spec.csi.volumeHandle}")
	s.inPod("keeper", "sh", "-c", "echo kept >/data/word && sync")
	s.deletePod("keeper")
	s.kubectl("delete", "pvc", "kept", "--timeout="+waitMax.String())
	s.await("volume released", func() error {
		if phase := s.get("pv", pv, "{.status.phase}"); phase != "Released" {
			return fmt.Errorf("phase %s", phase)
		}
		return nil
	})
	s.kubectl("delete", "pv", pv, "--timeout="+waitMax.String())
	all, err := s.volumes()
	require.NoError(s.t, err)
	require.Len(s.t, all, 1, "the object is gone, the volume is not")
	require.Equal(s.t, handle, all[0].ID)

	// Static provisioning: an operator writes a PersistentVolume for the old handle.
	s.apply(fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: static}
spec:
  capacity: {storage: 512Mi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Delete
  storageClassName: ""
  claimRef: {namespace: default, name: again}
  csi: {driver: csi.trivet.dev, volumeHandle: %s, fsType: xfs}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: again}
spec:
  storageClassName: ""
  volumeName: static
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 512Mi}}
`, handle))
	s.pod("finder", nodes[0], "again", idle)
	assert.Equal(s.t, "kept", s.inPod("finder", "cat", "/data/word"))
	s.deletePod("finder")
	s.kubectl("delete", "pvc", "again", "--timeout="+waitMax.String())
	s.kubectl("delete", "pv", "static", "--ignore-not-found", "--timeout="+waitMax.String())
	s.kubectl("delete", "storageclass", "retained")
	if _, err := s.trivet("volume", "delete", all[0].Name); err != nil {
		require.ErrorContains(s.t, err, "not found", "the provisioner may have deleted it")
	}
	s.requireTraceless()
}

// limitsHold measures two limits from the StorageClass with dd in a pod, past the page cache. They are
// far below what the machine can do, so that only the limit decides.
func limitsHold(s *suite) {
	const (
		bandwidth = 8 << 20 // bytes/s
		iops      = 150     // requests/s
	)
	s.apply(fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: limited}
provisioner: csi.trivet.dev
volumeBindingMode: WaitForFirstConsumer
parameters: {replicas: "3", bandwidthLimit: "%d", iopsLimit: "%d"}
`, bandwidth, iops))
	s.claim("limited", "limited", "Block")
	s.pod("measure", s.Nodes()[0], "limited", idle)
	for _, m := range []struct {
		name, dd string
		size     int     // bytes in all
		want     float64 // bytes/s
	}{
		{"bytes/s written", "if=/dev/zero of=/dev/volume bs=1M count=64 oflag=direct", 64 << 20, bandwidth},
		{"bytes/s read", "if=/dev/volume of=/dev/null bs=1M count=64 iflag=direct", 64 << 20, bandwidth},
		{"requests/s written", "if=/dev/zero of=/dev/volume bs=4k count=1200 oflag=direct", 1200 * 4096, iops * 4096},
	} {
		got := float64(m.size) / s.seconds("measure", "dd "+m.dd)
		s.t.Logf("%s: %.3f of the limit", m.name, got/m.want)
		assert.InEpsilon(s.t, m.want, got, 0.1, m.name)
	}
	s.deletePod("measure")
	s.kubectl("delete", "pvc/limited", "storageclass/limited", "--timeout="+waitMax.String())
}

// seconds runs a command in a pod and returns how long it took there, to 10 ms: the dd of busybox does
// not say.
func (s *suite) seconds(pod, command string) float64 {
	s.t.Helper()
	script := "cut -d' ' -f1 /proc/uptime && " + command + " 2>/dev/null && cut -d' ' -f1 /proc/uptime"
	var began, ended float64
	_, err := fmt.Sscan(s.inPod(pod, "sh", "-c", script), &began, &ended)
	require.NoError(s.t, err)
	require.Greater(s.t, ended, began)
	return ended - began
}

// writing appends a line to a file and syncs it, again and again, and says so on its output, with the
// time in seconds.
const writing = `i=0
while :; do
  i=$((i+1))
  { echo $i >>/data/log && sync /data/log; } 2>/dev/null || echo ERROR at $i
  echo $i $(cut -d' ' -f1 /proc/uptime)
done`

// deathOfServer kills the server that leads the volume of a pod on another node.
func deathOfServer(s *suite) {
	nodes := s.Nodes()
	s.claim("busy", "trivet-r3", "Filesystem")
	s.pod("busy", nodes[0], "busy", writing)
	pv := s.bound("busy")
	_, err := s.trivet("volume", "move-leader", pv, nodes[1])
	require.NoError(s.t, err)
	s.await("leader on "+nodes[1], func() error {
		var v volume
		if err := s.ask(&v, "volume", "show", pv); err != nil || v.leader() != nodes[1] {
			return fmt.Errorf("leader %q, %w", v.leader(), err)
		}
		return nil
	})
	victim := s.kubectl("get", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=node",
		"--field-selector=spec.nodeName="+nodes[1], "-o", "jsonpath={.items[0].metadata.name}")
	s.await("the pod writes", func() error {
		if s.kubectl("logs", "busy", "--tail=1") == "" {
			return errors.New("no line yet")
		}
		return nil
	})
	before := s.written("busy")
	require.NoError(s.t, s.KillContainer(s.t.Context(), nodes[1], namespace, victim, "trivet"))
	s.await("200 more synced lines", func() error {
		if now := s.written("busy"); now < before+200 {
			return fmt.Errorf("%d lines before the death, %d now", before, now)
		}
		return nil
	})
	s.await("the server restarted", func() error {
		path := `{.status.containerStatuses[?(@.name=="trivet")].restartCount}`
		if n := s.kubectl("get", "pod", victim, "-n", namespace, "-o", "jsonpath="+path); n != "1" {
			return fmt.Errorf("%s restarts", n)
		}
		return nil
	})
	s.awaitUp()
	said := s.kubectl("logs", "busy")
	require.NotContains(s.t, said, "ERROR")
	s.t.Logf("longest pause of the writing: %.2f s", longestPause(s.t, said))
	assert.Equal(s.t, "0", s.get("pod", "busy", "{.status.containerStatuses[0].restartCount}"))
	lines := s.written("busy")
	s.deletePod("busy")
	s.pod("check", nodes[1], "busy", idle)
	got, err := strconv.Atoi(s.inPod("check", "sh", "-c", "wc -l </data/log"))
	require.NoError(s.t, err)
	assert.GreaterOrEqual(s.t, got, lines, "no synced line is lost")
	assert.Equal(s.t, "0", s.inPod("check", "sh", "-c", "awk '$1!=NR{n++} END{print n+0}' /data/log"), "in order")
	s.deletePod("check")
}

// written returns the number of the last line that a pod said it has synced.
func (s *suite) written(pod string) int {
	s.t.Helper()
	number, _, _ := strings.Cut(s.kubectl("logs", pod, "--tail=1"), " ")
	require.NotEqual(s.t, "ERROR", number, "a write or a sync failed in the pod")
	n, err := strconv.Atoi(number)
	require.NoError(s.t, err)
	return n
}

// longestPause returns the longest time in seconds between two lines of the writing.
func longestPause(t *testing.T, log string) float64 {
	t.Helper()
	var last, longest float64
	for line := range strings.Lines(log) {
		var number int
		var at float64
		_, err := fmt.Sscan(line, &number, &at)
		require.NoError(t, err, line)
		if last > 0 {
			longest = max(longest, at-last)
		}
		last = at
	}
	return longest
}

// allPodsRestart deletes every pod of Trivet at once; the new ones have other addresses.
func allPodsRestart(s *suite) {
	before := s.awaitUp()
	s.kubectl("delete", "pods", "-n", namespace, "--all", "--timeout="+waitMax.String())
	wait := "--timeout=" + waitMax.String()
	s.kubectl("-n", namespace, "wait", "--for=jsonpath={.status.numberReady}=3", "daemonset/trivet-node", wait)
	s.kubectl("-n", namespace, "rollout", "status", "deployment/trivet-controller", wait)
	var after map[string]clusterNode
	s.await("new addresses known", func() error {
		after = s.awaitUp()
		for name := range before {
			if after[name].Address == before[name].Address {
				return fmt.Errorf("node %s is still said to be at %s", name, after[name].Address)
			}
		}
		return nil
	})
	s.pod("after", s.Nodes()[2], "busy", idle)
	assert.Equal(s.t, "1", s.inPod("after", "head", "-n1", "/data/log"))
	s.deletePod("after")
	s.kubectl("delete", "pvc", "busy", "--timeout="+waitMax.String())
}

// examples applies deploy/examples as they stand.
func examples(s *suite) {
	s.loadExampleImages()
	folder := filepath.Join(deploy, "examples")
	s.kubectl("apply", "-f", folder)
	wait := "--timeout=" + waitMax.String()
	s.kubectl("wait", "--for=condition=Ready", "pod/trivet-example", wait)
	s.kubectl("rollout", "status", "statefulset/trivet-example-db", wait)
	assert.Equal(s.t, "Bound", s.get("pvc", "trivet-example", "{.status.phase}"))
	s.await("the example has written", func() error {
		if s.kubectl("logs", "trivet-example") == "" {
			return errors.New("no output yet")
		}
		return nil
	})
	s.kubectl("delete", "-f", folder, wait)
	s.kubectl("delete", "pvc", "--all", wait) // a StatefulSet's claims outlive it
}

// loadExampleImages gives the nodes the image that the examples name, with the lab's busybox in it.
func (s *suite) loadExampleImages() {
	s.t.Helper()
	names := map[string]bool{}
	files, err := filepath.Glob(filepath.Join(deploy, "examples", "*.yaml"))
	require.NoError(s.t, err)
	for _, path := range files {
		text, err := os.ReadFile(path)
		require.NoError(s.t, err)
		for line := range strings.Lines(string(text)) {
			if image, ok := strings.CutPrefix(strings.TrimSpace(line), "image: "); ok {
				names["docker.io/library/"+image] = true
			}
		}
	}
	require.NotEmpty(s.t, names)
	for name := range names {
		require.NoError(s.t, s.TagImage(s.t.Context(), lab.BusyboxImage, name))
	}
}

func nothingIsLeft(s *suite) {
	s.awaitNoVolume()
	s.requireTraceless()
	var list struct{ Items []any }
	require.NoError(s.t, json.Unmarshal([]byte(s.kubectl("get", "pv,volumeattachments", "-o", "json")), &list))
	assert.Empty(s.t, list.Items)
	s.requireNoRestarts()
}

// requireNoRestarts fails if a container of Trivet's pods ended by itself.
func (s *suite) requireNoRestarts() {
	s.t.Helper()
	for _, line := range strings.Split(s.kubectl("get", "pods", "-n", namespace, "-o", "jsonpath="+
		`{range .items[*]}{.metadata.name} {.status.containerStatuses[*].restartCount} `+
		`{.status.initContainerStatuses[*].restartCount}{"\n"}{end}`), "\n") {
		for _, n := range strings.Fields(line)[1:] {
			assert.Equal(s.t, "0", n, "restarts of a pod's containers: %s", line)
		}
	}
}
