package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"helm.sh/helm/v3/pkg/chartutil"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"
)

const deployDir = "../../deploy"

// Types of other projects, as far as they are used, from their CRDs: their modules are large, or cannot be had.
type (
	object struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`
	}
	podMonitor struct { // monitoring.coreos.com/v1
		object `json:",inline"`

		Spec struct {
			Selector            metav1.LabelSelector `json:"selector"`
			PodMetricsEndpoints []struct {
				Port        string `json:"port"`
				Interval    string `json:"interval"`
				Relabelings []struct {
					SourceLabels []string `json:"sourceLabels"`
					TargetLabel  string   `json:"targetLabel"`
				} `json:"relabelings"`
			} `json:"podMetricsEndpoints"`
		} `json:"spec"`
	}
	prometheusRule struct { // monitoring.coreos.com/v1
		object `json:",inline"`

		Spec struct {
			Groups []struct {
				Name  string `json:"name"`
				Rules []struct {
					Alert       string            `json:"alert"`
					Expr        string            `json:"expr"`
					For         string            `json:"for"`
					Labels      map[string]string `json:"labels"`
					Annotations map[string]string `json:"annotations"`
				} `json:"rules"`
			} `json:"groups"`
		} `json:"spec"`
	}
	certIssuer struct { // cert-manager.io/v1
		object `json:",inline"`

		Spec struct {
			SelfSigned *struct{} `json:"selfSigned"`
		} `json:"spec"`
	}
	certificate struct { // cert-manager.io/v1
		object `json:",inline"`

		Spec struct {
			SecretName string   `json:"secretName"`
			IsCA       bool     `json:"isCA"`
			CommonName string   `json:"commonName"`
			URIs       []string `json:"uris"`
			Duration   string   `json:"duration"`
			PrivateKey struct {
				Algorithm      string `json:"algorithm"`
				Size           int    `json:"size"`
				RotationPolicy string `json:"rotationPolicy"`
			} `json:"privateKey"`
			Usages    []string `json:"usages"`
			IssuerRef struct {
				Name  string `json:"name"`
				Kind  string `json:"kind"`
				Group string `json:"group"`
			} `json:"issuerRef"`
		} `json:"spec"`
	}
	snapshotMetadataService struct { // cbt.storage.k8s.io/v1beta1
		object `json:",inline"`

		Spec struct {
			Address  string `json:"address"`
			Audience string `json:"audience"`
			CACert   []byte `json:"caCert"`
		} `json:"spec"`
	}
)

// kinds are the types that the chart may render.
var kinds = map[string]func() metav1.Object{
	"v1/Namespace":                  func() metav1.Object { return new(corev1.Namespace) },
	"v1/ServiceAccount":             func() metav1.Object { return new(corev1.ServiceAccount) },
	"v1/Service":                    func() metav1.Object { return new(corev1.Service) },
	"v1/PersistentVolumeClaim":      func() metav1.Object { return new(corev1.PersistentVolumeClaim) },
	"v1/Pod":                        func() metav1.Object { return new(corev1.Pod) },
	"apps/v1/DaemonSet":             func() metav1.Object { return new(appsv1.DaemonSet) },
	"apps/v1/Deployment":            func() metav1.Object { return new(appsv1.Deployment) },
	"apps/v1/StatefulSet":           func() metav1.Object { return new(appsv1.StatefulSet) },
	"batch/v1/Job":                  func() metav1.Object { return new(batchv1.Job) },
	"policy/v1/PodDisruptionBudget": func() metav1.Object { return new(policyv1.PodDisruptionBudget) },

	"networking.k8s.io/v1/NetworkPolicy": func() metav1.Object { return new(networkingv1.NetworkPolicy) },

	"rbac.authorization.k8s.io/v1/ClusterRole":        func() metav1.Object { return new(rbacv1.ClusterRole) },
	"rbac.authorization.k8s.io/v1/ClusterRoleBinding": func() metav1.Object { return new(rbacv1.ClusterRoleBinding) },
	"rbac.authorization.k8s.io/v1/Role":               func() metav1.Object { return new(rbacv1.Role) },
	"rbac.authorization.k8s.io/v1/RoleBinding":        func() metav1.Object { return new(rbacv1.RoleBinding) },

	"storage.k8s.io/v1/CSIDriver":             func() metav1.Object { return new(storagev1.CSIDriver) },
	"storage.k8s.io/v1/StorageClass":          func() metav1.Object { return new(storagev1.StorageClass) },
	"storage.k8s.io/v1/VolumeAttributesClass": func() metav1.Object { return new(storagev1.VolumeAttributesClass) },

	"snapshot.storage.k8s.io/v1/VolumeSnapshotClass": func() metav1.Object { return new(snapshotv1.VolumeSnapshotClass) },
	"snapshot.storage.k8s.io/v1/VolumeSnapshot":      func() metav1.Object { return new(snapshotv1.VolumeSnapshot) },
	"groupsnapshot.storage.k8s.io/v1/VolumeGroupSnapshotClass": func() metav1.Object {
		return new(groupsnapshotv1.VolumeGroupSnapshotClass)
	},
	"groupsnapshot.storage.k8s.io/v1/VolumeGroupSnapshot": func() metav1.Object {
		return new(groupsnapshotv1.VolumeGroupSnapshot)
	},

	"monitoring.coreos.com/v1/PodMonitor":                func() metav1.Object { return new(podMonitor) },
	"monitoring.coreos.com/v1/PrometheusRule":            func() metav1.Object { return new(prometheusRule) },
	"cert-manager.io/v1/Issuer":                          func() metav1.Object { return new(certIssuer) },
	"cert-manager.io/v1/Certificate":                     func() metav1.Object { return new(certificate) },
	"cbt.storage.k8s.io/v1beta1/SnapshotMetadataService": func() metav1.Object { return new(snapshotMetadataService) },
}

// decode decodes every document without tolerance.
func decode(t *testing.T, files map[string]string) []metav1.Object {
	t.Helper()
	var all []metav1.Object
	for _, name := range slices.Sorted(maps.Keys(files)) {
		for _, doc := range documents(files[name]) {
			var meta metav1.TypeMeta
			require.NoError(t, yaml.Unmarshal([]byte(doc), &meta), "%s: %s", name, doc)
			if meta.Kind == "" { // nothing but comments
				continue
			}
			key := meta.APIVersion + "/" + meta.Kind
			require.Contains(t, kinds, key, name)
			o := kinds[key]()
			require.NoError(t, yaml.UnmarshalStrict([]byte(doc), o), "%s: %s\n%s", name, key, doc)
			all = append(all, o)
		}
	}
	return all
}

func valuesFile(t *testing.T, name string) map[string]any {
	t.Helper()
	v, err := readValues(filepath.Join(deployDir, "values", name))
	require.NoError(t, err)
	return v
}

func mustRender(t *testing.T, values map[string]any, namespace string) map[string]string {
	t.Helper()
	files, err := render(options{chart: filepath.Join(deployDir, "chart"), values: values, namespace: namespace})
	require.NoError(t, err)
	return files
}

func TestLint(t *testing.T) { require.NoError(t, lintAll(deployDir)) }

// TestManifestsAreUpToDate: the files in deploy are what the chart gives.
func TestManifestsAreUpToDate(t *testing.T) { require.NoError(t, run(deployDir, true, false)) }

// TestDecodes: what the chart renders is what Kubernetes understands, field by field, and each object stands once.
func TestDecodes(t *testing.T) {
	for name, values := range map[string]map[string]any{
		"defaults": nil, "manifests": valuesFile(t, "manifests.yaml"), "full": valuesFile(t, "full.yaml"),
		"everything": valuesFile(t, "everything.yaml"),
	} {
		seen := map[string]bool{}
		for _, o := range decode(t, mustRender(t, values, "elsewhere")) {
			key := fmt.Sprintf("%T %s/%s", o, o.GetNamespace(), o.GetName())
			assert.False(t, seen[key], "%s: %s stands twice", name, key)
			seen[key] = true
			assert.Equal(t, "trivet", o.GetLabels()["app.kubernetes.io/name"], "%s: %s", name, key)
			assert.Equal(t, "Helm", o.GetLabels()["app.kubernetes.io/managed-by"], "%s: %s", name, key)
		}
		assert.Greater(t, len(seen), 20, name)
	}
	var examples = map[string]string{}
	paths, err := filepath.Glob(filepath.Join(deployDir, "examples", "*.yaml"))
	require.NoError(t, err)
	for _, p := range paths {
		text, err := os.ReadFile(p)
		require.NoError(t, err)
		examples[p] = string(text)
	}
	assert.NotEmpty(t, decode(t, examples))
}

// TestNamespace: nothing names the namespace of the plain manifests.
func TestNamespace(t *testing.T) {
	for name, text := range mustRender(t, valuesFile(t, "everything.yaml"), "elsewhere") {
		assert.NotContains(t, text, "trivet-system", name)
	}
}

// alternatives are other values of knobs whose value is one of a few, or has a form.
var alternatives = map[string]any{
	"image.pullPolicy": "Always", "kubeletPath": "/var/lib/k0s/kubelet", "logLevel": "warn",
	"certificates.mode": "existing", "certificates.validity": "100h", "certificates.certManager.duration": "9000h",
	"certificates.certManager.clusterID": "3f8a2b1c-0000-4000-8000-00000000000b",
	"csiDriver.fsGroupPolicy":            "None", "node.dataPath": "/data", "node.certsPath": "/certs",
	"node.attach":      "fuse",
	"node.cacheMemory": "2Gi", "node.replaceAfter": "2h", "keeper.watchdog": "3m", "failover.after": "40s",
	"init.timeout": "3m", "sidecars.timeout": "90s", "sidecars.snapshotter.enabled": false,
	"controller.pdb.unhealthyPodEvictionPolicy": "IfHealthyBudget", "podMonitor.interval": "5s",
	"imagePullSecrets": []any{"another"}, "node.disks": []any{"/disks/three"},
	"node.tolerations": []any{map[string]any{"key": "a"}}, "controller.tolerations": []any{map[string]any{"key": "a"}},
	"node.updateStrategy":        map[string]any{"type": "RollingUpdate"},
	"node.resources":             map[string]any{"limits": map[string]any{"cpu": "9"}},
	"networkPolicy.metricsFrom":  []any{map[string]any{"podSelector": map[string]any{}}},
	"networkPolicy.serversFrom":  []any{map[string]any{"podSelector": map[string]any{}}},
	"storageClasses":             []any{map[string]any{"name": "another"}},
	"volumeSnapshotClasses":      []any{map[string]any{"name": "another"}},
	"volumeGroupSnapshotClasses": []any{map[string]any{"name": "another"}},
	"volumeAttributesClasses":    []any{map[string]any{"name": "another", "parameters": map[string]any{"burst": "1"}}},
}

// other returns another value for a knob.
func other(path string, now any) any {
	if v, ok := alternatives[path]; ok {
		return v
	}
	switch v := now.(type) {
	case bool:
		return !v
	case float64:
		return v + 1
	case string:
		return v + "x"
	case []any:
		return append(slices.Clone(v), "--another")
	default: // resources, labels, affinity
		if strings.HasSuffix(strings.ToLower(path), "resources") {
			return map[string]any{"requests": map[string]any{"memory": "7Gi"}}
		}
		if strings.HasSuffix(path, "affinity") {
			return map[string]any{"nodeAffinity": map[string]any{}}
		}
		return map[string]any{"another": "one"}
	}
}

// at returns the value at a path, and a copy of the values with another one there.
func at(t *testing.T, values map[string]any, path string) (any, func(v any) map[string]any) {
	t.Helper()
	b, err := json.Marshal(values)
	require.NoError(t, err)
	var tree map[string]any
	require.NoError(t, json.Unmarshal(b, &tree))
	m := tree
	keys := strings.Split(path, ".")
	for _, k := range keys[:len(keys)-1] {
		next, ok := m[k].(map[string]any)
		require.True(t, ok, path)
		m = next
	}
	last := keys[len(keys)-1]
	return m[last], func(v any) map[string]any { m[last] = v; return tree }
}

// TestEveryKnobDoesSomething: it is explained, and what is rendered changes with it.
func TestEveryKnobDoesSomething(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(deployDir, "chart", "values.yaml"))
	require.NoError(t, err)
	all, err := knobs(text)
	require.NoError(t, err)
	require.Greater(t, len(all), 100)
	defaults := map[string]any{}
	require.NoError(t, yaml.Unmarshal(text, &defaults))
	everything := chartutil.CoalesceTables(valuesFile(t, "everything.yaml"), defaults)
	before := mustRender(t, everything, "elsewhere")
	for _, k := range all {
		assert.NotEmpty(t, k.comment, "%s: values.yaml does not say what it is", k.path)
		now, set := at(t, everything, k.path)
		values := set(other(k.path, now))
		switch {
		case k.path == "node.metrics.enabled":
			_, set = at(t, values, "podMonitor.enabled")
			_, set = at(t, set(false), "prometheusRule.enabled")
			values = set(false)
		case regexp.MustCompile(`^sidecars\..*\.enabled$`).MatchString(k.path):
			values = set(false)
		case k.path == "sidecars.resources": // of those that say nothing themselves
		}
		assert.NotEqual(t, before, mustRender(t, values, "elsewhere"), "%s = %v changes nothing", k.path, other(k.path, now))
	}
}

// TestRefused: values that are wrong are not rendered.
func TestRefused(t *testing.T) {
	for path, value := range map[string]any{
		"node.prot": 7400, "node.port": "7400", "node.attach": "iscsi", "failover.after": "soon", "kubeletPath": "var/lib",
		"csiDriver.nodeAllocatableUpdatePeriodSeconds": 5, "controller.replicas": 0, "sidecars.snapshotter.enabled": "maybe",
		"certificates.mode": "none", "nodee": map[string]any{}, "certificates.certManager.clusterID": "mine",
		"storageClasses":                    []any{map[string]any{"name": "a", "paramters": map[string]any{}}},
		"podMonitor.enabled":                true, // without metrics
		"sidecars.snapshotMetadata.enabled": true, // without its TLS
	} {
		values := map[string]any{}
		m := values
		keys := strings.Split(path, ".")
		for _, k := range keys[:len(keys)-1] {
			next := map[string]any{}
			m[k] = next
			m = next
		}
		m[keys[len(keys)-1]] = value
		_, err := render(options{chart: filepath.Join(deployDir, "chart"), values: values, namespace: "x"})
		assert.Error(t, err, "%s = %v", path, value)
	}
	_, err := render(options{
		chart: filepath.Join(deployDir, "chart"), namespace: "x",
		values: map[string]any{"certificates": map[string]any{"mode": "certManager"}},
	})
	assert.ErrorContains(t, err, "clusterID")
}

// TestSnapshotterComesWithItsAPI: `auto` looks at the cluster.
func TestSnapshotterComesWithItsAPI(t *testing.T) {
	saved := apis
	defer func() { apis = saved }()
	assert.Contains(t, mustRender(t, nil, "x")["controller.yaml"], "csi-snapshotter")
	apis = []string{"storage.k8s.io/v1"}
	assert.NotContains(t, mustRender(t, nil, "x")["controller.yaml"], "csi-snapshotter")
	assert.NotContains(t, mustRender(t, nil, "x")["rbac.yaml"], "trivet-snapshotter")
}

// TestBudgets: no budget can hold up a drain while all is well, and none counts pods that it cannot count.
func TestBudgets(t *testing.T) {
	all := decode(t, mustRender(t, nil, "x"))
	budgets := 0
	for _, o := range all {
		b, ok := o.(*policyv1.PodDisruptionBudget)
		if !ok {
			continue
		}
		budgets++
		s, err := metav1.LabelSelectorAsSelector(b.Spec.Selector)
		require.NoError(t, err)
		for _, o := range all {
			if d, ok := o.(*appsv1.DaemonSet); ok {
				assert.False(t, s.Matches(labels.Set(d.Spec.Template.Labels)),
					"a DaemonSet has no scale: a budget with maxUnavailable would allow no eviction, ever")
			}
		}
		assert.Equal(t, 1, b.Spec.MaxUnavailable.IntValue())
		assert.Nil(t, b.Spec.MinAvailable)
		assert.Equal(t, policyv1.AlwaysAllow, *b.Spec.UnhealthyPodEvictionPolicy)
	}
	assert.Equal(t, 1, budgets)
}

// TestKeeperOfUblk: only a keeper that has to end devices of the kernel may do more than read and write its socket.
func TestKeeperOfUblk(t *testing.T) {
	for _, attach := range []string{"auto", "fuse", "ublk"} {
		values := map[string]any{"node": map[string]any{"attach": attach}}
		for _, o := range decode(t, mustRender(t, values, "x")) {
			d, ok := o.(*appsv1.DaemonSet)
			if !ok || d.Name != "trivet-keeper" {
				continue
			}
			c := d.Spec.Template.Spec.Containers[0]
			privileged := c.SecurityContext.Privileged != nil && *c.SecurityContext.Privileged
			assert.Equal(t, attach == "ublk", privileged, attach)
			assert.Equal(t, attach == "ublk", slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool {
				return m.MountPath == "/dev"
			}), attach)
		}
	}
}

// TestPolicies: every pod of ours is selected by one policy, and the ports that are let in are ports that it has.
func TestPolicies(t *testing.T) {
	all := decode(t, mustRender(t, valuesFile(t, "everything.yaml"), "x"))
	var policies []*networkingv1.NetworkPolicy
	templates := map[string]corev1.PodTemplateSpec{}
	for _, o := range all {
		switch o := o.(type) {
		case *networkingv1.NetworkPolicy:
			policies = append(policies, o)
		case *appsv1.DaemonSet:
			templates[o.Name] = o.Spec.Template
		case *appsv1.Deployment:
			templates[o.Name] = o.Spec.Template
		case *batchv1.Job:
			templates[o.Name] = o.Spec.Template
		}
	}
	require.Len(t, templates, 4)
	for name, template := range templates {
		var by []*networkingv1.NetworkPolicy
		for _, p := range policies {
			s, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
			require.NoError(t, err)
			if s.Matches(labels.Set(template.Labels)) {
				by = append(by, p)
			}
		}
		require.Len(t, by, 1, name)
		ports := map[string]bool{}
		for _, c := range slices.Concat(template.Spec.InitContainers, template.Spec.Containers) {
			for _, p := range c.Ports {
				ports[p.Name] = true
			}
		}
		for _, rule := range by[0].Spec.Ingress {
			for _, p := range rule.Ports {
				assert.True(t, ports[p.Port.String()], "%s has no port %s", name, p.Port)
				delete(ports, p.Port.String())
			}
		}
		assert.Empty(t, ports, "%s: ports that nobody may reach", name)
	}
}

// TestAlertsNameMetricsThatExist, by docs/metrics.md.
func TestAlertsNameMetricsThatExist(t *testing.T) {
	text, err := os.ReadFile("../../docs/metrics.md")
	require.NoError(t, err)
	known := string(text)
	alerts := 0
	for _, o := range decode(t, mustRender(t, valuesFile(t, "everything.yaml"), "x")) {
		rule, ok := o.(*prometheusRule)
		if !ok {
			continue
		}
		for _, r := range rule.Spec.Groups[0].Rules {
			alerts++
			for _, m := range regexp.MustCompile(`trivet_[a-z_]+`).FindAllString(r.Expr, -1) {
				short := regexp.MustCompile(`^trivet_replica`).ReplaceAllString(m, "") // listed as "_term"
				assert.True(t, strings.Contains(known, "`"+m+"`") || strings.Contains(known, "`"+short+"`"), "%s: %s", r.Alert, m)
			}
			assert.NotEmpty(t, r.Annotations["summary"])
			assert.Contains(t, []string{"critical", "warning"}, r.Labels["severity"])
		}
	}
	assert.Greater(t, alerts, 5)
}

// TestImages: each of the list is pinned, and is what the chart asks for.
func TestImages(t *testing.T) {
	all := images(mustRender(t, valuesFile(t, "everything.yaml"), "x"))
	assert.Len(t, all, 9)
	for _, image := range all {
		assert.Regexp(t, `^(trivet:latest|registry\.k8s\.io/sig-storage/[a-z-]+:v\d+\.\d+\.\d+)$`, image)
	}
}
