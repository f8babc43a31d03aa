package smoke_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/e2e/lab"
)

// TestChart is the life of an installation by Helm, from the chart itself: `make e2e-chart`. It goes by docs/helm.md, and
// by docs/topology.md for what labels of nodes say.
func TestChart(t *testing.T) {
	if !testing.Short() {
		_, err := lab.FindHelm(t.Context(), e2eFolder)
		require.NoError(t, err)
	}
	s := start(t)
	s.step("helm install", helmInstall)
	s.step("a pod writes", helmPodWrites)
	s.step("labels of nodes say where they stand", labelsPlaceNodes)
	s.step("labels of nodes change", labelsChange)
	s.step("helm upgrade", helmUpgrade)
	s.step("helm uninstall", helmUninstall)
}

const (
	chartValues = "testdata/chart.yaml"
	helmPod     = "helmed"

	rackLabel = "example.com/rack" // of chartValues
	zoneLabel = "topology.kubernetes.io/zone"
)

// helm runs Helm, which must succeed, and returns what it printed.
func (s *suite) helm(args ...string) string {
	s.t.Helper()
	program, err := lab.FindHelm(s.t.Context(), e2eFolder)
	require.NoError(s.t, err)
	cmd := exec.CommandContext(s.t.Context(), program, append(args, "--kubeconfig", s.Kubeconfig(), "-n", namespace)...)
	home := s.t.TempDir() // nothing of the user's settings counts, and nothing is left there
	cmd.Env = append(os.Environ(), "HELM_CONFIG_HOME="+home, "HELM_CACHE_HOME="+home, "HELM_DATA_HOME="+home)
	out, err := cmd.CombinedOutput()
	require.NoError(s.t, err, "helm %s\n%s", strings.Join(args, " "), out)
	return string(out)
}

func helmInstall(s *suite) {
	nodes := s.Nodes()
	for i, rack := range []string{"r1", "r2"} { // the third has none
		s.kubectl("label", "node", nodes[i], rackLabel+"="+rack)
	}
	s.helm("install", "trivet", filepath.Join(deploy, "chart"), "--create-namespace", "-f", chartValues)
	s.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=privileged")
	wait := "--timeout=" + waitMax.String()
	s.kubectl("-n", namespace, "wait", "--for=condition=complete", "job/trivet-init", wait)
	s.kubectl("-n", namespace, "wait", "--for=jsonpath={.status.numberReady}=3", "daemonset/trivet-node", wait)
	s.kubectl("-n", namespace, "rollout", "status", "deployment/trivet-controller", wait)
	s.awaitUp()
	s.requireNoRestarts()
	assert.Contains(s.t, s.helm("status", "trivet"), "STATUS: deployed")
}

// helmPodWrites: the pod is on the third node, whose labels change, and writes to the end.
func helmPodWrites(s *suite) {
	s.claimOf(helmPod, "helm", "Filesystem", "512Mi", "")
	s.pod(helmPod, s.Nodes()[2], helmPod, writing)
	s.bound(helmPod)
	s.awaitLines(helmPod, 50)
}

// place is where a node stands.
type place struct{ zone, rack string }

// awaitPlace waits until everything says that a node stands there: the catalogue, the labels and the topology keys from which the
// provisioner and the scheduler know it, and a CSIStorageCapacity for each class.
func (s *suite) awaitPlace(node string, want place) {
	s.t.Helper()
	s.await(fmt.Sprintf("node %s stands at %+v", node, want), func() error {
		var list []clusterNode
		if err := s.ask(&list, "node", "list"); err != nil {
			return err
		}
		i := slices.IndexFunc(list, func(n clusterNode) bool { return n.ID == node })
		if i < 0 || (place{list[i].Zone, list[i].Rack}) != want {
			return fmt.Errorf("the catalogue: %+v", list)
		}
		const labels = `{.metadata.labels.topology\.csi\.trivet\.dev/zone},{.metadata.labels.topology\.csi\.trivet\.dev/rack}`
		if got := s.get("node", node, labels); got != want.zone+","+want.rack {
			return fmt.Errorf("labels of the node: %s", got)
		}
		keys := strings.Fields(s.get("csinode", node, `{range .spec.drivers[*].topologyKeys[*]}{@}{"\n"}{end}`))
		for key, value := range map[string]string{"zone": want.zone, "rack": want.rack} {
			if slices.Contains(keys, "topology.csi.trivet.dev/"+key) != (value != "") {
				return fmt.Errorf("topology keys of the driver: %q", keys)
			}
		}
		const segments = `{range .items[*]}{.nodeTopology.matchLabels}{"\n"}{end}`
		for line := range strings.Lines(s.kubectl("get", "csistoragecapacities", "-n", namespace, "-o", "jsonpath="+segments)) {
			if strings.Contains(line, `dev/node":"`+node+`"`) && (place{segment(line, "zone"), segment(line, "rack")}) == want {
				return nil
			}
		}
		return errors.New("no CSIStorageCapacity has these segments")
	})
}

// segment returns the value of a topology key in labels that are written as JSON.
func segment(labels, key string) string {
	_, after, _ := strings.Cut(labels, `topology.csi.trivet.dev/`+key+`":"`)
	value, _, _ := strings.Cut(after, `"`)
	return value
}

func labelsPlaceNodes(s *suite) {
	nodes := s.Nodes()
	s.awaitPlace(nodes[0], place{"z1", "r1"})
	s.awaitPlace(nodes[1], place{"z2", "r2"})
	s.awaitPlace(nodes[2], place{"z3", ""})
	s.requirePlaced("r2", nodes[1])
}

// requirePlaced makes a volume of one copy that only a rack may have, and checks that the node has it.
func (s *suite) requirePlaced(rack, node string) {
	s.t.Helper()
	name := "in-" + rack
	s.classIn(name, rack)
	s.claim(name, name, "Block")
	s.await("claim "+name+" bound", func() error {
		if s.get("pvc", name, "{.status.phase}") != "Bound" {
			return errors.New(s.kubectl("get", "events", "--field-selector=involvedObject.name="+name))
		}
		return nil
	})
	var v volume
	require.NoError(s.t, s.ask(&v, "volume", "show", s.bound(name)))
	require.Len(s.t, v.Replicas, 1)
	assert.Equal(s.t, node, v.Replicas[0].Node)
	s.kubectl("delete", "pvc/"+name, "storageclass/"+name, "--timeout="+waitMax.String())
}

// classIn makes a StorageClass of one copy in a rack.
func (s *suite) classIn(name, rack string) {
	s.t.Helper()
	s.apply(fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: %s}
provisioner: csi.trivet.dev
volumeBindingMode: Immediate
parameters: {replicas: "1"}
allowedTopologies:
  - matchLabelExpressions: [{key: topology.csi.trivet.dev/rack, values: [%s]}]
`, name, rack))
}

// labelsChange has a label given, changed and taken away, while a pod there writes.
func labelsChange(s *suite) {
	node := s.Nodes()[2]
	lines := s.written(helmPod)
	s.kubectl("label", "node", node, rackLabel+"=r3")
	s.awaitPlace(node, place{"z3", "r3"})
	s.requirePlaced("r3", node)

	s.kubectl("label", "--overwrite", "node", node, rackLabel+"=r4", zoneLabel+"=west")
	s.awaitPlace(node, place{"west", "r4"})
	s.requirePlaced("r4", node)

	// Its server starts again, and what it says then is what the labels say: the kubelet would register nothing else.
	victim := s.nodePod(node, "{.metadata.name}")
	s.kubectl("delete", "pod", "-n", namespace, victim, "--timeout="+waitMax.String())
	s.await("another server on "+node, func() error {
		if pod := s.nodePod(node, "{.metadata.name}"); pod == "" || pod == victim {
			return errors.New("not yet")
		}
		return nil
	})
	s.awaitUp()
	s.awaitPlace(node, place{"west", "r4"})
	s.requirePlaced("r4", node)

	s.kubectl("label", "node", node, rackLabel+"-")
	s.awaitPlace(node, place{"west", ""})
	s.awaitLines(helmPod, lines+100)
	assert.NotContains(s.t, s.kubectl("logs", helmPod), "ERROR")
	s.requireMounts(node)
}

// requireMounts starts another pod with a volume on a node: its kubelet has the driver.
func (s *suite) requireMounts(node string) {
	s.t.Helper()
	s.claimOf("another", "helm", "Filesystem", "512Mi", "")
	s.pod("another", node, "another", idle)
	s.deletePod("another")
	s.kubectl("delete", "pvc", "another", "--timeout="+waitMax.String())
}

// helmUpgrade changes one value. The servers are not touched by it.
func helmUpgrade(s *suite) {
	lines := s.written(helmPod)
	servers := s.kubectl("get", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=node", "-o",
		"jsonpath={.items[*].metadata.uid}")
	s.helm("upgrade", "trivet", filepath.Join(deploy, "chart"), "--reuse-values", "--set", "failover.after=20s")
	s.kubectl("-n", namespace, "rollout", "status", "deployment/trivet-controller", "--timeout="+waitMax.String())
	args := s.kubectl("get", "deployment/trivet-controller", "-n", namespace, "-o",
		`jsonpath={.spec.template.spec.containers[?(@.name=="csi-controller")].args}`)
	assert.Contains(s.t, args, "--failover-after=20s")
	assert.Contains(s.t, args, "--rack-label="+rackLabel, "the other values stay")
	assert.Equal(s.t, servers, s.kubectl("get", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=node", "-o",
		"jsonpath={.items[*].metadata.uid}"))
	s.awaitUp()
	s.requireMounts(s.Nodes()[0])
	s.awaitLines(helmPod, lines+100)
	assert.NotContains(s.t, s.kubectl("logs", helmPod), "ERROR")
	assert.Contains(s.t, s.helm("history", "trivet"), "superseded")
}

// helmUninstall goes by docs/helm.md: claims first. Nothing is stuck afterwards, and no node knows the driver.
func helmUninstall(s *suite) {
	wait := "--timeout=" + waitMax.String()
	s.deletePod(helmPod)
	s.kubectl("delete", "pvc", helmPod, wait)
	s.await("no PersistentVolume", func() error {
		if out := s.kubectl("get", "pv,volumeattachments", "-o", "name"); out != "" {
			return errors.New(out)
		}
		return nil
	})
	s.awaitNoVolume()
	s.requireTraceless()
	s.helm("uninstall", "trivet", "--wait", wait)
	s.await("no pod is left", func() error {
		if out := s.kubectl("get", "pods", "-n", namespace, "-o", "name"); out != "" {
			return errors.New(out)
		}
		return nil
	})
	for _, node := range s.Nodes() {
		s.await("kubelet of "+node+" has forgotten the driver", func() error {
			if got := s.get("csinode", node, "{.spec.drivers[*].name}"); got != "" {
				return fmt.Errorf("drivers %q", got)
			}
			return nil
		})
	}
	ours := "clusterroles,clusterrolebindings,csidrivers,storageclasses,priorityclasses,csistoragecapacities"
	for line := range strings.Lines(s.kubectl("get", ours, "-A", "-o", "name")) {
		assert.NotContains(s.t, line, "trivet")
		assert.NotContains(s.t, line, "storageclass")
		assert.NotContains(s.t, line, "csistoragecapacity")
	}
	s.kubectl("delete", "namespace", namespace, wait)
	s.requireTraceless()
}
