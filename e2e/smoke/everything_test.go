package smoke_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/e2e/lab"
)

// TestEverything is the story of the manifests with all sidecars, deploy/full: `make e2e`.
func TestEverything(t *testing.T) {
	s := start(t)
	s.step("install with all sidecars", installEverything)
	s.step("a snapshot is restored", snapshotIsRestored)
	s.step("a claim is cloned", claimIsCloned)
	s.step("a claim grows in use", claimGrows)
	s.step("a running pod gets another class", classChanges)
	s.step("several claims at one point", groupIsOnePoint)
	s.step("two nodes write to one device", twoNodesWrite)
	s.step("a node is drained", nodeIsDrained)
	s.step("a rolling update under fio", rollingUpdate)
	s.step("nothing is left", nothingIsLeft)
	s.step("a pod is deleted while it writes", deletedWhileItWrites)
	s.step("a claim and its snapshot go while they are restored", sourceGoesWhileRestored)
	s.step("a kubelet dies", kubeletDies)
	s.step("the API server is away for a minute", apiServerAway)
	s.step("sidecars die in the middle of calls", sidecarsDie)
	s.step("death of a node", deathOfNode)
}

func installEverything(s *suite) { installFrom(s, filepath.Join(deploy, "full")) }

// installFrom installs Trivet with all sidecars by a kustomization, and waits until it serves.
func installFrom(s *suite, folder string) {
	began := time.Now()
	require.NoError(s.t, s.InstallSnapshots(s.t.Context()))
	s.kubectl("apply", "-k", folder)
	wait := "--timeout=" + waitMax.String()
	s.kubectl("-n", namespace, "wait", "--for=condition=complete", "job/trivet-init", wait)
	s.kubectl("-n", namespace, "wait", "--for=jsonpath={.status.numberReady}=3", "daemonset/trivet-node", wait)
	s.kubectl("-n", namespace, "rollout", "status", "deployment/trivet-controller", wait)
	s.awaitUp()
	s.t.Logf("installed in %.1f s", time.Since(began).Seconds())
	for _, name := range s.Nodes() {
		s.await("kubelet of "+name+" has the driver", func() error {
			if got := s.get("csinode", name, "{.spec.drivers[*].name}"); got != "csi.trivet.dev" {
				return fmt.Errorf("drivers %q", got)
			}
			return nil
		})
	}
	s.requireNoRestarts()
	for _, file := range []string{"storageclass.yaml", "volumeattributesclass.yaml", "snapshots/classes.yaml"} {
		s.kubectl("apply", "-f", filepath.Join(deploy, "examples", file))
	}
	s.growingClass(xfsClass, "xfs", "WaitForFirstConsumer")
}

// xfsClass is a class of xfs: ext4 grows in use only with rights that not every machine of a lab has; the VM tests grow it.
const xfsClass = "xfs"

// xfsClaim makes a claim of that class, of 512 MiB: mkfs.xfs wants 300.
func (s *suite) xfsClaim(name, mode string) {
	s.t.Helper()
	s.claimOf(name, xfsClass, mode, "512Mi", "")
}

// Data sources of claims.
const (
	ofSnapshot = "apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: "
	ofClaim    = "kind: PersistentVolumeClaim, name: "
)

// claimFrom makes a claim that begins with what its source holds.
func (s *suite) claimFrom(name, class, mode, size, source string) {
	s.t.Helper()
	s.claimOf(name, class, mode, size, "dataSource: {"+source+"}")
}

// The claim from which snapshots and clones are made, and the pod that has it.
const sourceClaim = "source"

func snapshotIsRestored(s *suite) {
	nodes := s.Nodes()
	s.xfsClaim(sourceClaim, "Filesystem")
	s.pod(sourceClaim, nodes[0], sourceClaim, idle)
	s.inPod(sourceClaim, "sh", "-c",
		"dd if=/dev/urandom of=/data/file bs=64k count=128 && echo before >/data/word && sync")
	want := s.inPod(sourceClaim, "md5sum", "/data/file")
	s.snapshot("early", sourceClaim)
	s.awaitReadyToUse("volumesnapshot", "early")
	s.inPod(sourceClaim, "sh", "-c", "echo after >/data/word && rm /data/file && sync")

	s.claimFrom("restored", xfsClass, "Filesystem", "512Mi", ofSnapshot+"early")
	s.pod("restored", nodes[1], "restored", idle)
	assert.Equal(s.t, "before", s.inPod("restored", "cat", "/data/word"))
	assert.Equal(s.t, want, s.inPod("restored", "md5sum", "/data/file"))
	assert.Equal(s.t, "after", s.inPod(sourceClaim, "cat", "/data/word"))

	// It outlives its claim, and a larger claim has a larger filesystem.
	s.deletePod("restored")
	s.deletePod(sourceClaim)
	s.kubectl("delete", "pvc", "restored", sourceClaim, "--timeout="+waitMax.String())
	s.claimFrom("larger", xfsClass, "Filesystem", "1Gi", ofSnapshot+"early")
	s.pod("larger", nodes[2], "larger", idle)
	assert.Equal(s.t, want, s.inPod("larger", "md5sum", "/data/file"))
	assert.Greater(s.t, s.sizeKiB("larger"), 900<<10)
	s.deletePod("larger")
	s.kubectl("delete", "pvc/larger", "volumesnapshot/early", "--timeout="+waitMax.String())
	s.await("contents of snapshots gone", func() error {
		if out := s.kubectl("get", "volumesnapshotcontents", "-o", "name"); out != "" {
			return errors.New(out)
		}
		return nil
	})
}

// awaitReadyToUse waits until a snapshot, or a group of them, can be restored.
func (s *suite) awaitReadyToUse(kind, name string) {
	s.t.Helper()
	s.await(kind+" "+name+" ready", func() error {
		if out := s.get(kind, name, "{.status.readyToUse} {.status.error.message}"); strings.TrimSpace(out) != "true" {
			return fmt.Errorf("readyToUse %s", out)
		}
		return nil
	})
}

// sizeKiB returns the size in KiB of the filesystem that a pod has at /data.
func (s *suite) sizeKiB(pod string) int {
	s.t.Helper()
	n, err := strconv.Atoi(s.inPod(pod, "sh", "-c", "df -k /data | tail -n1 | awk '{print $2}'"))
	require.NoError(s.t, err)
	return n
}

func claimIsCloned(s *suite) {
	nodes := s.Nodes()
	s.claim("original", "trivet-r3", "Filesystem")
	s.pod("original", nodes[0], "original", idle)
	s.inPod("original", "sh", "-c", "dd if=/dev/urandom of=/data/file bs=64k count=128 && sync")
	want := s.inPod("original", "md5sum", "/data/file")
	s.claimFrom("clone", "trivet-r3", "Filesystem", "256Mi", ofClaim+"original")
	s.pod("clone", nodes[1], "clone", idle)
	assert.Equal(s.t, want, s.inPod("clone", "md5sum", "/data/file"))
	s.inPod("clone", "sh", "-c", "echo mine >/data/file && sync")
	assert.Equal(s.t, want, s.inPod("original", "md5sum", "/data/file"))
	s.deletePod("original")
	s.kubectl("delete", "pvc/original", "--timeout="+waitMax.String())
	assert.Equal(s.t, "mine", s.inPod("clone", "cat", "/data/file"))
	s.deletePod("clone")
	s.kubectl("delete", "pvc/clone", "--timeout="+waitMax.String())
}

// claimGrows has an xfs and a device grow under their pods, both at once: a kubelet looks at a pod every minute or so.
func claimGrows(s *suite) {
	const file, device = "growing-file", "growing-device"
	s.xfsClaim(file, "Filesystem")
	s.xfsClaim(device, "Block")
	for _, name := range []string{file, device} {
		s.pod(name, s.Nodes()[0], name, idle)
	}
	s.inPod(file, "sh", "-c", "echo kept >/data/word && sync")
	for _, name := range []string{file, device} {
		s.kubectl("patch", "pvc", name, "-p", `{"spec":{"resources":{"requests":{"storage":"1Gi"}}}}`)
	}
	for _, name := range []string{file, device} {
		s.await(name+" has grown", func() error {
			if got := s.get("pvc", name, "{.status.capacity.storage}"); got != "1Gi" {
				return fmt.Errorf("capacity %s, conditions %s", got, s.get("pvc", name, "{.status.conditions}"))
			}
			return nil
		})
	}
	assert.Greater(s.t, s.sizeKiB(file), 900<<10)
	assert.Equal(s.t, "kept", s.inPod(file, "cat", "/data/word"))
	s.await("the pod sees the device's size", func() error {
		if got := s.inPod(device, "blockdev", "--getsize64", "/dev/volume"); got != strconv.Itoa(1<<30) {
			return fmt.Errorf("%s bytes", got)
		}
		return nil
	})
	for _, name := range []string{file, device} {
		assert.Equal(s.t, "0", s.get("pod", name, "{.status.containerStatuses[0].restartCount}"))
		s.deletePod(name)
		s.kubectl("delete", "pvc", name, "--timeout="+waitMax.String())
	}
}

// classChanges gives a pod that runs another limit, and then a class that nobody can have: the old one stays.
func classChanges(s *suite) {
	const slow, fast = 8 << 20, 24 << 20 // bytes/s
	for name, parameters := range map[string]string{
		"slow": `{bandwidthLimit: 8Mi}`, "fast": `{bandwidthLimit: 24Mi}`, "wrong": `{bandwidthLimit: 1Mi, colour: blue}`,
	} {
		s.apply(fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: VolumeAttributesClass
metadata: {name: %s}
driverName: csi.trivet.dev
parameters: %s
`, name, parameters))
	}
	s.apply(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: classy}
spec:
  storageClassName: trivet-r3
  volumeAttributesClassName: slow
  volumeMode: Block
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 256Mi}}
`)
	s.pod("classy", s.Nodes()[0], "classy", idle)
	rate := func(want float64) {
		s.t.Helper()
		const bytes = 64 << 20
		got := bytes / s.seconds("classy", "dd if=/dev/zero of=/dev/volume bs=1M count=64 oflag=direct")
		s.t.Logf("%.3f of the limit", got/want)
		assert.InEpsilon(s.t, want, got, 0.1)
	}
	rate(slow)
	change := func(class, path, want string) {
		s.t.Helper()
		s.kubectl("patch", "pvc", "classy", "-p", `{"spec":{"volumeAttributesClassName":"`+class+`"}}`)
		s.await("claim changed to "+class, func() error {
			if got := s.get("pvc", "classy", path); got != want {
				return fmt.Errorf("status %s", s.get("pvc", "classy", "{.status}"))
			}
			return nil
		})
	}
	change("fast", "{.status.currentVolumeAttributesClassName}", "fast")
	rate(fast)
	change("wrong", "{.status.modifyVolumeStatus.status}", "Infeasible")
	assert.Equal(s.t, "fast", s.get("pvc", "classy", "{.status.currentVolumeAttributesClassName}"))
	rate(fast)
	change("slow", "{.status.currentVolumeAttributesClassName}", "slow")
	rate(slow)
	s.deletePod("classy")
	s.kubectl("delete", "pvc/classy", "volumeattributesclass/slow", "volumeattributesclass/fast",
		"volumeattributesclass/wrong", "--timeout="+waitMax.String())
}

// counting writes a number to one device, and when that is durable to the other, again and again.
const counting = `i=0
while :; do
  i=$((i+1))
  for d in a b; do
    printf "$d%4095d" $i | dd of=/dev/$d bs=4096 iflag=fullblock oflag=direct conv=fsync 2>/dev/null || echo ERROR at $i
  done
  echo $i
done`

func groupIsOnePoint(s *suite) {
	for _, name := range []string{"a", "b"} {
		s.apply(fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: pair-%s, labels: {app: pair}}
spec:
  storageClassName: trivet-r3
  volumeMode: Block
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 64Mi}}
`, name))
	}
	s.apply(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: pair}
spec:
  terminationGracePeriodSeconds: 0
  containers:
    - name: main
      image: %s
      imagePullPolicy: Never
      command: [sh, -c, %s]
      volumeDevices: [{name: a, devicePath: /dev/a}, {name: b, devicePath: /dev/b}]
  volumes:
    - {name: a, persistentVolumeClaim: {claimName: pair-a}}
    - {name: b, persistentVolumeClaim: {claimName: pair-b}}
`, lab.BusyboxImage, strconv.Quote(counting)))
	s.await("the pod counts", func() error {
		if s.get("pod", "pair", "{.status.phase}") != "Running" || s.kubectl("logs", "pair", "--tail=1") == "" {
			return errors.New("no line yet")
		}
		return nil
	})
	before := s.written("pair")
	s.apply(`
apiVersion: groupsnapshot.storage.k8s.io/v1
kind: VolumeGroupSnapshot
metadata: {name: pair}
spec:
  volumeGroupSnapshotClassName: trivet
  source: {selector: {matchLabels: {app: pair}}}
`)
	s.awaitReadyToUse("volumegroupsnapshot", "pair")
	after := s.written("pair")
	var members []string // the snapshot controller names the group in each of them after it says that the group is ready
	s.await("both snapshots are of the group", func() error {
		members = strings.Fields(s.kubectl("get", "volumesnapshots", "-o",
			`jsonpath={range .items[?(@.status.volumeGroupSnapshotName=="pair")]}{.metadata.name}{"\n"}{end}`))
		if len(members) != 2 {
			return fmt.Errorf("of the group: %v", members)
		}
		return nil
	})
	counts := map[string]int{}
	for i, member := range members {
		s.awaitReadyToUse("volumesnapshot", member)
		name := "raw-" + strconv.Itoa(i)
		s.claimFrom(name, "trivet-r3", "Block", "64Mi", ofSnapshot+member)
		s.pod(name, s.Nodes()[1], name, idle)
		word := s.inPod(name, "sh", "-c", "dd if=/dev/volume bs=4096 count=1 2>/dev/null | tr -d ' '")
		n, err := strconv.Atoi(word[1:])
		require.NoError(s.t, err)
		counts[word[:1]] = n
		s.deletePod(name)
	}
	s.t.Logf("between %d and %d: %v", before, after, counts)
	require.Len(s.t, counts, 2)
	assert.Contains(s.t, []int{0, 1}, counts["a"]-counts["b"], "a is written first: %v", counts)
	assert.GreaterOrEqual(s.t, counts["b"], before)
	assert.LessOrEqual(s.t, counts["a"], after+1)
	assert.NotContains(s.t, s.kubectl("logs", "pair"), "ERROR")
	s.deletePod("pair")
	wait := "--timeout=" + waitMax.String()
	s.kubectl("delete", "volumegroupsnapshot", "pair", wait)
	s.kubectl("delete", "pvc", "raw-0", "raw-1", "pair-a", "pair-b", wait)
}

// twoNodesWrite has pods on two nodes see each other's writes to one device.
func twoNodesWrite(s *suite) {
	nodes := s.Nodes()
	s.apply(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: shared}
spec:
  storageClassName: trivet-r3
  volumeMode: Block
  accessModes: [ReadWriteMany]
  resources: {requests: {storage: 64Mi}}
`)
	pods := []string{"left", "right"}
	for i, name := range pods {
		s.pod(name, nodes[i], "shared", idle)
	}
	for round := range 6 {
		from, to := pods[round%2], pods[(round+1)%2]
		s.inPod(from, "sh", "-c", fmt.Sprintf(
			"printf '%%4096d' %d | dd of=/dev/volume bs=4096 iflag=fullblock oflag=direct 2>/dev/null", round))
		got := s.inPod(to, "sh", "-c", "dd if=/dev/volume bs=4096 count=1 iflag=direct 2>/dev/null | tr -d ' '")
		assert.Equal(s.t, strconv.Itoa(round), got, "written on the node of %s, read on that of %s", from, to)
	}
	for _, name := range pods {
		s.deletePod(name)
	}
	s.kubectl("delete", "pvc/shared", "--timeout="+waitMax.String())
}

// nodeIsDrained moves a StatefulSet's pod, and Trivet's own controllers, off a node by eviction.
func nodeIsDrained(s *suite) {
	s.statefulSet("moved")
	victim := s.get("pod", "moved-0", "{.spec.nodeName}")
	lines := s.written("moved-0")
	s.kubectl("drain", victim, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout="+waitMax.String())
	s.await("the pod writes elsewhere", func() error {
		node := s.get("pod", "moved-0", "{.spec.nodeName}")
		if node == "" || node == victim || s.get("pod", "moved-0", "{.status.phase}") != "Running" {
			return fmt.Errorf("on %q", node)
		}
		if s.kubectl("logs", "moved-0", "--tail=1") == "" || s.written("moved-0") <= lines {
			return errors.New("it does not write yet")
		}
		return nil
	})
	s.kubectl("uncordon", victim)
	s.kubectl("-n", namespace, "rollout", "status", "deployment/trivet-controller", "--timeout="+waitMax.String())
	s.requireWholeLog("moved-0", lines)
	s.kubectl("delete", "statefulset/moved", "pvc/data-moved-0", "--timeout="+waitMax.String())
}

// fioImage is made of the machine's own fio.
const fioImage = "localhost/fio:latest"

// nodePod returns a field of Trivet's pod on a node; "" when there is none.
func (s *suite) nodePod(node, path string) string {
	s.t.Helper()
	return s.kubectl("get", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=node",
		"--field-selector=spec.nodeName="+node, "-o", "jsonpath={range .items[*]}"+path+"{end}")
}

// rollingUpdate replaces the servers of all nodes, one after the other as docs/helm.md says, while fio writes to a device on the first,
// reads it again, and compares.
func rollingUpdate(s *suite) {
	require.NoError(s.t, s.LoadPrograms(s.t.Context(), fioImage, "fio"))
	s.claim("verified", "trivet-r3", "Block")
	script := `n=0
while [ ! -e /tmp/stop ]; do
  fio --name=verify --filename=/dev/volume --size=32m --rw=randwrite --bsrange=4k-64k --ioengine=libaio --direct=1 \
    --iodepth=8 --verify=crc32c --verify_fatal=1 --randrepeat=0 --output=/tmp/said || { cat /tmp/said; echo ERROR; exit 1; }
  n=$((n+1))
  echo $n
done`
	s.podOf(fioImage, "verified", s.Nodes()[0], "verified", script)
	rounds := func(n int) {
		s.t.Helper()
		s.await("more rounds of fio", func() error {
			if s.kubectl("logs", "verified", "--tail=1") == "" {
				return errors.New("none yet")
			}
			if now := s.written("verified"); now < n {
				return fmt.Errorf("%d of %d rounds", now, n)
			}
			return nil
		})
	}
	rounds(1)
	s.kubectl("-n", namespace, "rollout", "restart", "daemonset/trivet-node")
	for _, node := range s.Nodes() {
		old := s.nodePod(node, "{.metadata.name}")
		s.kubectl("-n", namespace, "delete", "pod", old, "--timeout="+waitMax.String())
		s.await("the new server of "+node+" is ready", func() error {
			now := s.nodePod(node, `{.metadata.name} {.status.conditions[?(@.type=="Ready")].status}`)
			if strings.HasPrefix(now, old+" ") || !strings.HasSuffix(now, " True") {
				return fmt.Errorf("pod %s", now)
			}
			return nil
		})
		s.awaitUp()
	}
	rounds(s.written("verified") + 2)
	s.inPod("verified", "touch", "/tmp/stop")
	s.await("fio is content", func() error {
		if phase := s.get("pod", "verified", "{.status.phase}"); phase != "Succeeded" {
			return fmt.Errorf("phase %s, said %s", phase, s.kubectl("logs", "verified", "--tail=20"))
		}
		return nil
	})
	s.t.Logf("%d rounds", s.written("verified"))
	s.deletePod("verified")
	s.kubectl("delete", "pvc/verified", "--timeout="+waitMax.String())
}
