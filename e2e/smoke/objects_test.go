package smoke_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/e2e/lab"
)

// claim makes a PersistentVolumeClaim.
func (s *suite) claim(name, class, mode string) {
	s.t.Helper()
	s.claimOf(name, class, mode, "256Mi", "")
}

// claimOf is claim of another size, with one more field of its spec, or "".
func (s *suite) claimOf(name, class, mode, size, field string) {
	s.t.Helper()
	s.apply(fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %s}
spec:
  storageClassName: %s
  volumeMode: %s
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: %s}}
  %s
`, name, class, mode, size, field))
}

// growingClass makes a StorageClass of three replicas whose claims may grow.
func (s *suite) growingClass(name, fsType, binding string) {
	s.t.Helper()
	s.apply(fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: %s}
provisioner: csi.trivet.dev
allowVolumeExpansion: true
volumeBindingMode: %s
parameters: {replicas: "3", csi.storage.k8s.io/fstype: %s}
`, name, binding, fsType))
}

// snapshot asks for a snapshot of a claim.
func (s *suite) snapshot(name, claim string) {
	s.t.Helper()
	s.apply(fmt.Sprintf(`
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: %s}
spec:
  volumeSnapshotClassName: trivet
  source: {persistentVolumeClaimName: %s}
`, name, claim))
}

// pod starts a pod of busybox on a node, with a claim at /data, or as the device /dev/volume when the
// claim is of mode Block, and waits until it runs.
func (s *suite) pod(name, node, claim, script string) {
	s.t.Helper()
	s.podOf(lab.BusyboxImage, name, node, claim, script)
}

// podOf is pod with another image that has a shell.
func (s *suite) podOf(image, name, node, claim, script string) {
	s.t.Helper()
	s.makePod(image, name, node, claim, script)
	s.awaitRunning(name)
}

// podWithoutWaiting makes a pod of busybox that does nothing, as pod does.
func (s *suite) podWithoutWaiting(name, node, claim string) {
	s.t.Helper()
	s.makePod(lab.BusyboxImage, name, node, claim, idle)
}

func (s *suite) makePod(image, name, node, claim, script string) {
	s.t.Helper()
	mount := "volumeMounts: [{name: data, mountPath: /data}]"
	if s.get("pvc", claim, "{.spec.volumeMode}") == "Block" {
		mount = "volumeDevices: [{name: data, devicePath: /dev/volume}]"
	}
	command, err := json.Marshal([]string{"sh", "-c", script})
	require.NoError(s.t, err)
	s.apply(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeSelector: {kubernetes.io/hostname: %s}
  terminationGracePeriodSeconds: 0
  restartPolicy: Never
  containers:
    - name: main
      image: %s
      imagePullPolicy: Never
      command: %s
      %s
  volumes: [{name: data, persistentVolumeClaim: {claimName: %s}}]
`, name, node, image, command, mount, claim))
}

func (s *suite) awaitRunning(name string) {
	s.t.Helper()
	s.await("pod "+name+" running", func() error {
		if phase := s.get("pod", name, "{.status.phase}"); phase != "Running" {
			return fmt.Errorf("phase %s", phase)
		}
		return nil
	})
}

// statefulSet starts a StatefulSet of one pod, which appends lines to a file of its claim, and waits until it does.
func (s *suite) statefulSet(name string) {
	s.t.Helper()
	s.apply(fmt.Sprintf(`
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: %[1]s}
spec:
  serviceName: %[1]s
  replicas: 1
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: main
          image: %[2]s
          imagePullPolicy: Never
          command: [sh, -c, %[3]s]
          volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
    - metadata: {name: data}
      spec:
        storageClassName: trivet-r3
        accessModes: [ReadWriteOnce]
        resources: {requests: {storage: 256Mi}}
`, name, lab.BusyboxImage,
		strconv.Quote("i=$(cat /data/log 2>/dev/null | wc -l)\n"+strings.TrimPrefix(writing, "i=0\n"))))
	pod := name + "-0"
	s.await("the pod writes", func() error {
		if s.get("pod", pod, "{.status.phase}") != "Running" || s.kubectl("logs", pod, "--tail=1") == "" {
			return errors.New("no line yet")
		}
		return nil
	})
	s.awaitLines(pod, 50)
}

// requireWholeLog checks that a pod of a StatefulSet has the lines that it had, in order.
func (s *suite) requireWholeLog(pod string, lines int) {
	s.t.Helper()
	got, err := strconv.Atoi(s.inPod(pod, "sh", "-c", "wc -l </data/log"))
	require.NoError(s.t, err)
	require.GreaterOrEqual(s.t, got, lines, "no synced line is lost")
	require.Equal(s.t, "0", s.inPod(pod, "sh", "-c", "awk '$1!=NR{n++} END{print n+0}' /data/log"), "in order")
}

// idle is the script of a pod whose work is done by inPod.
const idle = "sleep 86400"

// deletePod deletes a pod and waits until it is gone, its volume unmounted.
func (s *suite) deletePod(name string) {
	s.t.Helper()
	s.kubectl("delete", "pod", name, "--timeout="+waitMax.String())
}

// bound returns the name of the PersistentVolume of a claim, which must be bound.
func (s *suite) bound(claim string) string {
	s.t.Helper()
	require.Equal(s.t, "Bound", s.get("pvc", claim, "{.status.phase}"))
	return s.get("pvc", claim, "{.spec.volumeName}")
}

// volume is what the CLI says of one.
type volume struct {
	ID       string `json:"id"`
	Name     string `json:"name"`
	Phase    string `json:"phase"`
	Attached string `json:"attachedNode"`
	Replicas []struct {
		Node   string `json:"node"`
		State  string `json:"state"`
		Leader bool   `json:"leader"`
	} `json:"replicas"`
}

// leader returns the node of the volume's leader, "" when there is none.
func (v volume) leader() string {
	for _, r := range v.Replicas {
		if r.Leader {
			return r.Node
		}
	}
	return ""
}

// volumes returns the volumes that Trivet knows.
func (s *suite) volumes() ([]volume, error) {
	var all []volume
	err := s.ask(&all, "volume", "list")
	return all, err
}

// clusterNode is what the CLI says of a node.
type clusterNode struct {
	ID      string `json:"id"`
	Address string `json:"address"`
	Zone    string `json:"zone"`
	Rack    string `json:"rack"`
	State   string `json:"state"`
}

// awaitUp waits until Trivet says that every node is up, and returns them by name.
func (s *suite) awaitUp() map[string]clusterNode {
	s.t.Helper()
	var status struct {
		Nodes    []clusterNode `json:"nodes"`
		Warnings []string      `json:"warnings"`
	}
	byName := map[string]clusterNode{}
	s.await("every node up", func() error {
		if err := s.ask(&status, "cluster", "status"); err != nil {
			return err
		}
		clear(byName)
		for _, n := range status.Nodes {
			if n.State == "Up" {
				byName[n.ID] = n
			}
		}
		if len(byName) != len(s.Nodes()) || len(status.Warnings) > 0 {
			return fmt.Errorf("nodes %+v, warnings %q", status.Nodes, status.Warnings)
		}
		return nil
	})
	return byName
}

// awaitNoVolume waits until Trivet knows of no volume.
func (s *suite) awaitNoVolume() {
	s.t.Helper()
	s.await("no volume is left", func() error {
		all, err := s.volumes()
		if err == nil && len(all) > 0 {
			err = fmt.Errorf("volumes %+v", all)
		}
		return err
	})
}

// requireTraceless fails unless no node has a trace of a volume: no mount, no loop device of ours, no
// folder of the kubelet's but the empty ones that it keeps, no file of a cache in the folder that a server keeps for
// those.
func (s *suite) requireTraceless() {
	s.t.Helper()
	for _, node := range s.Nodes() {
		s.await("traces of volumes gone from "+node, func() error {
			mounts, err := s.Exec(s.t.Context(), node, "cat", "/proc/self/mountinfo")
			if err != nil {
				return err
			}
			for line := range strings.Lines(mounts) {
				if strings.Contains(line, "/run/trivet/") || strings.Contains(line, "csi.trivet.dev") ||
					strings.Contains(line, "kubernetes.io~csi") {
					return fmt.Errorf("mount %s", line)
				}
			}
			left, err := s.Exec(s.t.Context(), node, "sh", "-c",
				"find /var/lib/kubelet/plugins/kubernetes.io/csi -mindepth 3; "+
					"find /run/trivet -mindepth 2 -not -path '/run/trivet/cache/*'; "+
					"find /run/trivet -path '/run/trivet/cache/*' -not -type d")
			if err != nil {
				return err
			}
			if left != "" {
				return fmt.Errorf("files %s", left)
			}
			return nil
		})
	}
}
