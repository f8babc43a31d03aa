// Package deploy_test reads the manifests as Kubernetes would, field by field, and checks that they
// agree with each other and with the program.
package deploy_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
)

const namespace = "trivet-system"

// kinds are the types that the manifests may use, by apiVersion and kind.
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

	"rbac.authorization.k8s.io/v1/ClusterRole":        func() metav1.Object { return new(rbacv1.ClusterRole) },
	"rbac.authorization.k8s.io/v1/ClusterRoleBinding": func() metav1.Object { return new(rbacv1.ClusterRoleBinding) },
	"rbac.authorization.k8s.io/v1/Role":               func() metav1.Object { return new(rbacv1.Role) },
	"rbac.authorization.k8s.io/v1/RoleBinding":        func() metav1.Object { return new(rbacv1.RoleBinding) },
	"storage.k8s.io/v1/CSIDriver":                     func() metav1.Object { return new(storagev1.CSIDriver) },
	"storage.k8s.io/v1/StorageClass":                  func() metav1.Object { return new(storagev1.StorageClass) },

	"storage.k8s.io/v1/VolumeAttributesClass": func() metav1.Object { return new(storagev1.VolumeAttributesClass) },

	"snapshot.storage.k8s.io/v1/VolumeSnapshotClass":           func() metav1.Object { return new(snapshotClass) },
	"snapshot.storage.k8s.io/v1/VolumeSnapshot":                func() metav1.Object { return new(snapshot) },
	"groupsnapshot.storage.k8s.io/v1/VolumeGroupSnapshotClass": func() metav1.Object { return new(groupClass) },
	"groupsnapshot.storage.k8s.io/v1/VolumeGroupSnapshot":      func() metav1.Object { return new(groupSnapshot) },
}

// snapshotClass and snapshot are what the examples use of external-snapshotter's types; tools/chart decodes them into
// those themselves.
type (
	snapshotClass struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`

		Driver         string `json:"driver"`
		DeletionPolicy string `json:"deletionPolicy"`
	}
	snapshot struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`

		Spec struct {
			ClassName      string `json:"volumeSnapshotClassName"`
			GroupClassName string `json:"volumeGroupSnapshotClassName"`
			Source         struct {
				ClaimName string                `json:"persistentVolumeClaimName"`
				Selector  *metav1.LabelSelector `json:"selector"`
			} `json:"source"`
		} `json:"spec"`
	}
	groupClass    struct{ snapshotClass }
	groupSnapshot struct{ snapshot }
)

// manifests returns every document of every file, decoded without tolerance: an unknown field, a
// field given twice and a kind that is not in the table fail the test.
func manifests(t *testing.T) map[string][]metav1.Object {
	t.Helper()
	var paths []string
	for _, pattern := range []string{"*.yaml", "examples/*.yaml", "examples/snapshots/*.yaml"} {
		found, err := filepath.Glob(pattern)
		require.NoError(t, err)
		paths = append(paths, found...)
	}
	out := make(map[string][]metav1.Object)
	for _, path := range paths {
		if path == "kustomization.yaml" {
			continue
		}
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		for _, doc := range regexp.MustCompile(`(?m)^---$`).Split(string(text), -1) {
			out[path] = append(out[path], decode(t, path, []byte(doc)))
		}
	}
	require.GreaterOrEqual(t, len(out), 9, "files are missing")
	return out
}

func decode(t *testing.T, path string, doc []byte) metav1.Object {
	t.Helper()
	var meta metav1.TypeMeta
	require.NoError(t, yaml.Unmarshal(doc, &meta), path)
	key := meta.APIVersion + "/" + meta.Kind
	require.Contains(t, kinds, key, path)
	obj := kinds[key]()
	require.NoError(t, yaml.UnmarshalStrict(doc, obj), "%s: %s", path, key)
	return obj
}

// all returns every object of a type.
func all[T metav1.Object](t *testing.T) []T {
	t.Helper()
	var out []T
	for _, objects := range manifests(t) {
		for _, o := range objects {
			if typed, ok := o.(T); ok {
				out = append(out, typed)
			}
		}
	}
	require.NotEmpty(t, out)
	return out
}

// one returns the only object of a type.
func one[T metav1.Object](t *testing.T) T {
	t.Helper()
	found := all[T](t)
	require.Len(t, found, 1)
	return found[0]
}

// podSpecs returns the templates of what stands in the namespace, by component.
func podSpecs(t *testing.T) map[string]corev1.PodSpec {
	t.Helper()
	return map[string]corev1.PodSpec{
		"node":       daemonSet(t, "trivet-node").Spec.Template.Spec,
		"keeper":     daemonSet(t, "trivet-keeper").Spec.Template.Spec,
		"controller": one[*appsv1.Deployment](t).Spec.Template.Spec,
		"init":       one[*batchv1.Job](t).Spec.Template.Spec,
	}
}

func daemonSet(t *testing.T, name string) *appsv1.DaemonSet {
	t.Helper()
	found := all[*appsv1.DaemonSet](t)
	i := slices.IndexFunc(found, func(d *appsv1.DaemonSet) bool { return d.Name == name })
	require.GreaterOrEqual(t, i, 0, "daemon set %s", name)
	return found[i]
}

// containers returns all of them, those that start first in front.
func containers(spec corev1.PodSpec) []corev1.Container {
	return slices.Concat(spec.InitContainers, spec.Containers)
}

func container(t *testing.T, spec corev1.PodSpec, name string) corev1.Container {
	t.Helper()
	found := containers(spec)
	i := slices.IndexFunc(found, func(c corev1.Container) bool { return c.Name == name })
	require.GreaterOrEqual(t, i, 0, "container %s", name)
	return found[i]
}

// flag returns the value of the flag in the container's arguments.
func flag(t *testing.T, c corev1.Container, name string) string {
	t.Helper()
	for _, a := range c.Args {
		if v, ok := strings.CutPrefix(a, "--"+name+"="); ok {
			return v
		}
	}
	t.Fatalf("container %s has no flag --%s", c.Name, name)
	return ""
}

// onHost returns what a path in the container is called on the host, and its mount.
func onHost(t *testing.T, spec corev1.PodSpec, c corev1.Container, path string) (string, corev1.VolumeMount) {
	t.Helper()
	var best corev1.VolumeMount
	for _, m := range c.VolumeMounts {
		inside := path == m.MountPath || strings.HasPrefix(path, m.MountPath+"/")
		if inside && len(m.MountPath) > len(best.MountPath) {
			best = m
		}
	}
	require.NotEmpty(t, best.Name, "%s of container %s is in no volume", path, c.Name)
	for _, v := range spec.Volumes {
		if v.Name == best.Name && v.HostPath != nil {
			return v.HostPath.Path + strings.TrimPrefix(path, best.MountPath), best
		}
	}
	t.Fatalf("%s of container %s is not on the host", path, c.Name)
	return "", best
}

func TestNamesAgree(t *testing.T) {
	t.Parallel()
	assert.Equal(t, trivet.DriverName, one[*storagev1.CSIDriver](t).Name)
	assert.Equal(t, namespace, one[*corev1.Namespace](t).Name)
	classes := make(map[string]bool)
	for _, class := range all[*storagev1.StorageClass](t) {
		classes[class.Name] = true
		assert.Equal(t, trivet.DriverName, class.Provisioner)
		_, err := controller.ParseParams(class.Parameters)
		require.NoError(t, err)
		assert.Equal(t, storagev1.VolumeBindingWaitForFirstConsumer, *class.VolumeBindingMode)
		assert.True(t, *class.AllowVolumeExpansion)
		assert.Empty(t, class.Annotations, "no default class")
	}
	claims := make(map[string]bool)
	for _, claim := range all[*corev1.PersistentVolumeClaim](t) {
		assert.Contains(t, classes, *claim.Spec.StorageClassName)
		claims[claim.Name] = true
	}
	assert.Contains(t, claims, one[*corev1.Pod](t).Spec.Volumes[0].PersistentVolumeClaim.ClaimName)
	assert.Contains(t, classes, *one[*appsv1.StatefulSet](t).Spec.VolumeClaimTemplates[0].Spec.StorageClassName)

	seen := make(map[string]bool)
	for path, objects := range manifests(t) {
		for _, o := range objects {
			id := strings.Join([]string{path, o.GetNamespace(), o.GetName()}, " ")
			switch o.(type) {
			case *corev1.Namespace, *storagev1.CSIDriver, *storagev1.StorageClass, *storagev1.VolumeAttributesClass,
				*snapshotClass, *groupClass, *rbacv1.ClusterRole, *rbacv1.ClusterRoleBinding:
				assert.Empty(t, o.GetNamespace(), id)
			default:
				want := namespace
				switch {
				case strings.HasPrefix(path, "examples"):
					want = "" // wherever the user is
				case o.GetName() == "trivet-failover":
					want = corev1.NamespaceNodeLease // it reads what kubelets say of themselves
				}
				assert.Equal(t, want, o.GetNamespace(), id)
			}
			key := fmt.Sprintf("%T %s %s", o, o.GetNamespace(), o.GetName())
			assert.False(t, seen[key], "%s stands twice", key)
			seen[key] = true
		}
	}
}

func TestServiceAccounts(t *testing.T) {
	t.Parallel()
	accounts := make(map[string]*corev1.ServiceAccount)
	for _, a := range all[*corev1.ServiceAccount](t) {
		accounts[a.Name] = a
	}
	used := make(map[string]bool)
	for component, spec := range podSpecs(t) {
		used[spec.ServiceAccountName] = true
		assert.Equal(t, "trivet-"+component, spec.ServiceAccountName)
		assert.Contains(t, accounts, spec.ServiceAccountName)
	}
	assert.Len(t, accounts, len(used), "an account that nobody uses")
	assert.False(t, *accounts["trivet-node"].AutomountServiceAccountToken, "the node pods need nothing of the API")

	roles, bound := make(map[string]bool), make(map[string]bool)
	for _, r := range all[*rbacv1.ClusterRole](t) {
		roles["ClusterRole "+r.Name] = true
		assertNoWildcard(t, r.Rules)
		for _, rule := range r.Rules {
			assert.NotContains(t, rule.Resources, "secrets", r.Name)
		}
	}
	for _, r := range all[*rbacv1.Role](t) {
		roles["Role "+r.Name] = true
		assertNoWildcard(t, r.Rules)
		for _, rule := range r.Rules {
			if slices.Contains(rule.Resources, "secrets") && !slices.Contains(rule.Verbs, "create") {
				assert.Equal(t, []string{"trivet-ca"}, rule.ResourceNames, r.Name)
			}
		}
	}
	check := func(ref rbacv1.RoleRef, subjects []rbacv1.Subject) {
		bound[ref.Kind+" "+ref.Name] = true
		require.Len(t, subjects, 1)
		assert.Equal(t, namespace, subjects[0].Namespace)
		assert.Contains(t, []string{"trivet-controller", "trivet-init"}, subjects[0].Name, "nodes may do nothing")
	}
	for _, b := range all[*rbacv1.ClusterRoleBinding](t) {
		check(b.RoleRef, b.Subjects)
	}
	for _, b := range all[*rbacv1.RoleBinding](t) {
		check(b.RoleRef, b.Subjects)
	}
	assert.Equal(t, roles, bound, "roles there are, and roles that are bound")
}

func assertNoWildcard(t *testing.T, rules []rbacv1.PolicyRule) {
	t.Helper()
	for _, r := range rules {
		assert.NotContains(t, slices.Concat(r.APIGroups, r.Resources, r.Verbs), "*")
	}
}

func TestSocketsAgree(t *testing.T) {
	t.Parallel()
	node := podSpecs(t)["node"]
	server := container(t, node, "trivet")
	path, ok := strings.CutPrefix(flag(t, server, "csi"), "unix://")
	require.True(t, ok)
	host, _ := onHost(t, node, server, path)
	assert.Equal(t, "/var/lib/kubelet/plugins/"+trivet.DriverName+"/csi.sock", host)
	assert.Less(t, len(host), 108, "sun_path, unix(7)")

	assert.Equal(t, host, path, "kubelet and server must call the socket alike")
	registration, _ := onHost(t, node, server, flag(t, server, "register"))
	assert.Equal(t, "/var/lib/kubelet/plugins_registry", registration)
	assert.Equal(t, registration, flag(t, server, "register"))

	sidecars := one[*appsv1.Deployment](t).Spec.Template.Spec
	served := strings.TrimPrefix(flag(t, container(t, sidecars, "csi-controller"), "csi"), "unix://")
	for _, c := range sidecars.Containers {
		assert.Contains(t, mountPaths(c), filepath.Dir(served), c.Name)
		if c.Name != "csi-controller" {
			assert.Equal(t, served, flag(t, c, "csi-address"), c.Name)
		}
	}
}

func mountPaths(c corev1.Container) []string {
	var paths []string
	for _, m := range c.VolumeMounts {
		paths = append(paths, m.MountPath)
	}
	return paths
}

// TestKeeper: server and keeper meet on the host, neither ends with the other, and an update of either
// replaces no pod by itself.
func TestKeeper(t *testing.T) {
	t.Parallel()
	specs := podSpecs(t)
	server, keeper := container(t, specs["node"], "trivet"), container(t, specs["keeper"], "keeper")
	want, _ := onHost(t, specs["node"], server, flag(t, server, "keeper"))
	got, _ := onHost(t, specs["keeper"], keeper, flag(t, keeper, "socket"))
	assert.Equal(t, want, got)
	assert.Less(t, len(got), 108, "sun_path, unix(7)")
	assert.EqualValues(t, 0, *keeper.SecurityContext.RunAsUser, "the server's user")
	runDir, mount := onHost(t, specs["node"], server, flag(t, server, "run-dir"))
	assert.Equal(t, "/run/trivet", runDir, "gone with the boot, as the devices are")
	assert.Equal(t, corev1.MountPropagationBidirectional, *mount.MountPropagation)
	for _, d := range all[*appsv1.DaemonSet](t) {
		assert.Equal(t, appsv1.OnDeleteDaemonSetStrategyType, d.Spec.UpdateStrategy.Type, d.Name)
	}
}

// TestUsers: all containers of the controller share a socket and files that only their owner may
// read, and none of them is root or may become it.
func TestUsers(t *testing.T) {
	t.Parallel()
	for _, component := range []string{"controller", "init"} {
		spec := podSpecs(t)[component]
		assert.True(t, *spec.SecurityContext.RunAsNonRoot, component)
		for _, c := range containers(spec) {
			assert.Nil(t, c.SecurityContext.RunAsUser, c.Name)
		}
	}
	for component, spec := range podSpecs(t) {
		for _, c := range containers(spec) {
			assert.True(t, *c.SecurityContext.ReadOnlyRootFilesystem, "%s %s", component, c.Name)
			if component == "node" && c.Name == "trivet" {
				continue // privileged
			}
			assert.False(t, *c.SecurityContext.AllowPrivilegeEscalation, "%s %s", component, c.Name)
			assert.Equal(t, []corev1.Capability{"ALL"}, c.SecurityContext.Capabilities.Drop, "%s %s", component, c.Name)
		}
	}
}

// TestCertificates: who issues, who asks and who uses agree on names, files and addresses.
func TestCertificates(t *testing.T) {
	t.Parallel()
	specs := podSpecs(t)
	issuer, enroll := container(t, specs["controller"], "issuer"), container(t, specs["node"], "certificate")
	server, ctrl := container(t, specs["node"], "trivet"), container(t, specs["controller"], "csi-controller")

	assert.Equal(t, "system:serviceaccount:"+namespace+":"+specs["node"].ServiceAccountName,
		flag(t, issuer, "node-account"))
	service := service(t, "trivet-issuer")
	_, port, err := net.SplitHostPort(flag(t, issuer, "listen"))
	require.NoError(t, err)
	assert.Equal(t, fmt.Sprintf("https://%s.%s.svc:%s", service.Name, namespace, port), flag(t, enroll, "issuer"))
	assert.Equal(t, port, strconv.Itoa(int(service.Spec.Ports[0].Port)))
	assert.Equal(t, service.Spec.Ports[0].TargetPort.String(), issuer.Ports[0].Name)
	assert.Equal(t, port, strconv.Itoa(int(issuer.Ports[0].ContainerPort)))
	assertSelects(t, labels.SelectorFromSet(service.Spec.Selector), one[*appsv1.Deployment](t).Spec.Template.Labels)
	assert.True(t, service.Spec.PublishNotReadyAddresses, "nodes must find it before the cluster is born")

	assert.Equal(t, flag(t, enroll, "dir"), flag(t, server, "certs"))
	assert.Equal(t, flag(t, issuer, "client-dir"), flag(t, ctrl, "certs"))
	assert.Contains(t, mountPaths(ctrl), flag(t, issuer, "client-dir"))
	assert.Contains(t, mountPaths(issuer), flag(t, issuer, "ca"))
	for _, path := range []string{flag(t, enroll, "ca"), flag(t, enroll, "token")} {
		assert.Contains(t, mountPaths(enroll), filepath.Dir(path))
	}
	for c, dir := range map[*corev1.Container]string{
		&issuer: flag(t, issuer, "client-dir"), &enroll: flag(t, enroll, "dir"),
	} {
		assert.Equal(t, corev1.ContainerRestartPolicyAlways, *c.RestartPolicy, c.Name)
		assert.Equal(t, []string{"trivet", "cert", "show", "--dir=" + dir}, c.StartupProbe.Exec.Command, c.Name)
	}
	for _, v := range specs["node"].Volumes {
		assert.Nil(t, v.Secret, "volume %s: no key of the cluster's goes to a node", v.Name)
		if v.Projected != nil {
			assert.Equal(t, trivet.DriverName, v.Projected.Sources[0].ServiceAccountToken.Audience)
		}
	}
}

func TestServerPaths(t *testing.T) {
	t.Parallel()
	spec := daemonSet(t, "trivet-node").Spec.Template.Spec
	server := container(t, spec, "trivet")
	assert.True(t, *server.SecurityContext.Privileged)
	for _, name := range []string{"data", "disk", "certs", "run-dir"} {
		path := flag(t, server, name)
		host, mount := onHost(t, spec, server, path)
		assert.Equal(t, path, host, "--%s: the same inside and outside, so that messages can be followed", name)
		assert.Equal(t, name == "certs", mount.ReadOnly, "--%s", name)
	}
	// What the server mounts must be seen outside, at the path that kubelet named.
	for _, path := range []string{"/var/lib/kubelet/pods", flag(t, server, "run-dir")} {
		host, mount := onHost(t, spec, server, path)
		assert.Equal(t, path, host)
		require.NotNil(t, mount.MountPropagation, path)
		assert.Equal(t, corev1.MountPropagationBidirectional, *mount.MountPropagation, path)
	}
	host, _ := onHost(t, spec, server, "/dev")
	assert.Equal(t, "/dev", host)
}

func service(t *testing.T, name string) *corev1.Service {
	t.Helper()
	for _, s := range all[*corev1.Service](t) {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("no Service %s", name)
	return nil
}

func TestSeedIsTheService(t *testing.T) {
	t.Parallel()
	set := daemonSet(t, "trivet-node")
	service := service(t, "trivet")
	server := container(t, set.Spec.Template.Spec, "trivet")
	seed := flag(t, server, "seed")
	assert.Equal(t, seed, flag(t, container(t, podSpecs(t)["init"], "init"), "server"))
	assert.Equal(t, seed, flag(t, container(t, podSpecs(t)["controller"], "csi-controller"), "server"))
	host, port, err := net.SplitHostPort(seed)
	require.NoError(t, err)
	assert.Equal(t, service.Name+"."+service.Namespace+".svc", host)
	assert.Equal(t, corev1.ClusterIPNone, service.Spec.ClusterIP)
	assert.True(t, service.Spec.PublishNotReadyAddresses)
	assertSelects(t, labels.SelectorFromSet(service.Spec.Selector), set.Spec.Template.Labels)
	_, listen, err := net.SplitHostPort(flag(t, server, "listen"))
	require.NoError(t, err)
	_, advertised, err := net.SplitHostPort(flag(t, server, "advertise"))
	require.NoError(t, err)
	require.Len(t, service.Spec.Ports, 1)
	require.Len(t, server.Ports, 1)
	assert.Equal(t, service.Spec.Ports[0].TargetPort.String(), server.Ports[0].Name)
	for _, p := range []string{listen, advertised, strconv.Itoa(int(service.Spec.Ports[0].Port))} {
		assert.Equal(t, port, p)
	}
	assert.Equal(t, port, strconv.Itoa(int(server.Ports[0].ContainerPort)))
}

func TestSelectors(t *testing.T) {
	t.Parallel()
	set, deployment := daemonSet(t, "trivet-node"), one[*appsv1.Deployment](t)
	keeper := daemonSet(t, "trivet-keeper")
	budget := one[*policyv1.PodDisruptionBudget](t)
	affinity := deployment.Spec.Template.Spec.Affinity
	nodePods, sidecarPods := set.Spec.Template.Labels, deployment.Spec.Template.Labels
	for name, tt := range map[string]struct {
		selector    *metav1.LabelSelector
		want, other map[string]string
	}{
		"daemon set": {set.Spec.Selector, nodePods, sidecarPods},
		"keeper":     {keeper.Spec.Selector, keeper.Spec.Template.Labels, nodePods},
		"deployment": {deployment.Spec.Selector, sidecarPods, nodePods},
		"budget":     {budget.Spec.Selector, sidecarPods, nodePods},
		"apart": {
			affinity.PodAntiAffinity.PreferredDuringSchedulingIgnoredDuringExecution[0].PodAffinityTerm.LabelSelector,
			sidecarPods, nodePods,
		},
	} {
		s, err := metav1.LabelSelectorAsSelector(tt.selector)
		require.NoError(t, err, name)
		assertSelects(t, s, tt.want)
		assert.False(t, s.Matches(labels.Set(tt.other)), name)
	}
}

func assertSelects(t *testing.T, s labels.Selector, set map[string]string) {
	t.Helper()
	assert.False(t, s.Empty())
	assert.True(t, s.Matches(labels.Set(set)), "%s does not select %v", s, set)
}

// TestPodSpecs: mounts and volumes belong together, and $(NAME) in an argument is an environment
// variable that is set; Kubernetes leaves a misspelt one as it stands.
func TestPodSpecs(t *testing.T) {
	t.Parallel()
	variable := regexp.MustCompile(`\$\((\w+)\)`)
	for _, spec := range podSpecs(t) {
		volumes, mounted := make(map[string]bool), make(map[string]bool)
		for _, v := range spec.Volumes {
			volumes[v.Name] = true
		}
		for _, c := range containers(spec) {
			env := make(map[string]bool)
			for _, e := range c.Env {
				env[e.Name] = true
			}
			for _, m := range c.VolumeMounts {
				mounted[m.Name] = true
			}
			for _, a := range c.Args {
				for _, m := range variable.FindAllStringSubmatch(a, -1) {
					assert.True(t, env[m[1]], "%s: %s is not set", c.Name, m[1])
				}
			}
			assert.NotEmpty(t, c.Resources.Requests, c.Name)
		}
		assert.Equal(t, volumes, mounted)
	}
	provisioner := container(t, one[*appsv1.Deployment](t).Spec.Template.Spec, "csi-provisioner")
	env := make([]string, 0, len(provisioner.Env))
	for _, e := range provisioner.Env {
		env = append(env, e.Name)
	}
	assert.Subset(t, env, []string{"NAMESPACE", "POD_NAME"}, "it finds the owner of the capacity objects through them")
}

// TestFlagsExist: every flag in the manifests and the README is one that the program has.
func TestFlagsExist(t *testing.T) {
	t.Parallel()
	known := programFlags(t)
	for _, spec := range podSpecs(t) {
		for _, c := range containers(spec) {
			if c.Image != "trivet:latest" {
				continue
			}
			for _, a := range c.Args {
				if name, _, _ := strings.Cut(a, "="); strings.HasPrefix(name, "--") {
					assert.Contains(t, known, strings.TrimPrefix(name, "--"), c.Name)
				}
			}
		}
	}
	text, err := os.ReadFile("README.md")
	require.NoError(t, err)
	commands := regexp.MustCompile(`(?m)(^\s*|-- )trivet .*$`).FindAll(text, -1)
	require.NotEmpty(t, commands)
	for _, line := range commands {
		for _, m := range regexp.MustCompile(`--([a-z-]+)`).FindAllSubmatch(line, -1) {
			assert.Contains(t, known, string(m[1]), "README.md: %s", bytes.TrimSpace(line))
		}
	}
}

// programFlags reads the names of the flags from the source of the program.
func programFlags(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("../cmd/trivet/*.go")
	require.NoError(t, err)
	defines := regexp.MustCompile(`^(String|StringArray|StringSlice|StringToString|Bool|Int|Int64|Duration)VarP?$`)
	var names []string
	for _, path := range files {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		require.NoError(t, err)
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) < 2 {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			lit, isLit := call.Args[1].(*ast.BasicLit)
			if !ok || !isLit || !defines.MatchString(sel.Sel.Name) {
				return true
			}
			name, err := strconv.Unquote(lit.Value)
			require.NoError(t, err)
			names = append(names, name)
			return true
		})
	}
	require.Contains(t, names, "csi", "the search finds nothing")
	return names
}

func TestKustomization(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("kustomization.yaml")
	require.NoError(t, err)
	var k struct {
		metav1.TypeMeta `json:",inline"`

		Resources []string `json:"resources"`
	}
	require.NoError(t, yaml.UnmarshalStrict(text, &k))
	var want []string
	for path := range manifests(t) {
		if filepath.Dir(path) == "." { // neither examples nor the optional component
			want = append(want, path)
		}
	}
	assert.ElementsMatch(t, want, k.Resources)
	assert.Equal(t, "namespace.yaml", k.Resources[0], "the others need it")
}

// TestRegistrarComponent: the patch takes away the flag that it tests for, and the sidecar looks for
// the socket where the server makes it.
func TestRegistrarComponent(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("registrar/patch.yaml")
	require.NoError(t, err)
	var ops []struct {
		Op    string `json:"op"`
		Path  string `json:"path"`
		Value any    `json:"value"`
	}
	require.NoError(t, yaml.UnmarshalStrict(text, &ops))
	server := container(t, podSpecs(t)["node"], "trivet")
	at := fmt.Sprintf("/spec/template/spec/containers/0/args/%d", slices.IndexFunc(server.Args, func(a string) bool {
		return strings.HasPrefix(a, "--register=")
	}))
	assert.Equal(t, "test", ops[0].Op)
	assert.Equal(t, at, ops[0].Path)
	assert.Equal(t, "--register="+flag(t, server, "register"), ops[0].Value)
	assert.Equal(t, "remove", ops[1].Op)
	assert.Equal(t, at, ops[1].Path)
	socket := strings.TrimPrefix(flag(t, server, "csi"), "unix://")
	assert.Contains(t, string(text), "--kubelet-registration-path="+socket+"\n")
	assert.Contains(t, string(text), "path: "+filepath.Dir(socket)+"\n")
}

// TestSnapshotExamples: names agree, and the parameters of classes that volumes may change to are ones that change.
func TestSnapshotExamples(t *testing.T) {
	t.Parallel()
	claims := map[string]bool{}
	for _, c := range all[*corev1.PersistentVolumeClaim](t) {
		claims[c.Name] = true
	}
	for _, c := range []*snapshotClass{one[*snapshotClass](t), &one[*groupClass](t).snapshotClass} {
		assert.Equal(t, trivet.DriverName, c.Driver)
		assert.Equal(t, "trivet", c.Name)
		assert.Equal(t, "Delete", c.DeletionPolicy)
	}
	single, group := one[*snapshot](t), one[*groupSnapshot](t)
	assert.Equal(t, "trivet", single.Spec.ClassName)
	assert.True(t, claims[single.Spec.Source.ClaimName])
	assert.Equal(t, "trivet", group.Spec.GroupClassName)
	selector, err := metav1.LabelSelectorAsSelector(group.Spec.Source.Selector)
	require.NoError(t, err)
	assertSelects(t, selector, one[*appsv1.StatefulSet](t).Spec.VolumeClaimTemplates[0].Labels)
	for _, c := range all[*storagev1.VolumeAttributesClass](t) {
		assert.Equal(t, trivet.DriverName, c.DriverName)
		_, err := controller.ParseParams(c.Parameters)
		require.NoError(t, err, c.Name)
		for key := range c.Parameters {
			assert.Contains(t, controller.LiveParams(), key, c.Name)
		}
	}
}

// TestChartSum: the manifests were made from the chart as it is. Only tools/chart, with Helm in it, can make them
// again (`make chart`); this says whether that was forgotten.
func TestChartSum(t *testing.T) {
	t.Parallel()
	sums, err := os.ReadFile("chart.sum")
	require.NoError(t, err)
	listed := map[string]bool{}
	for line := range strings.Lines(string(sums)) {
		want, path, ok := strings.Cut(strings.TrimSpace(line), "  ")
		require.True(t, ok, line)
		listed[path] = true
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		assert.Equal(t, want, fmt.Sprintf("%x", sha256.Sum256(text)), "%s: run `make manifests`", path)
	}
	for _, folder := range []string{"chart", "values"} {
		require.NoError(t, filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
			assert.True(t, err != nil || d.IsDir() || listed[filepath.ToSlash(path)], "%s: run `make manifests`", path)
			return err
		}))
	}
	for path := range manifests(t) {
		if filepath.Dir(path) == "." {
			assert.True(t, listed[path], "%s is not made from the chart", path)
		}
	}
}

// TestImagesAreListed: a site without a way to a registry finds every image in images.txt.
func TestImagesAreListed(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("images.txt")
	require.NoError(t, err)
	listed := strings.Fields(string(text))
	for _, spec := range podSpecs(t) {
		for _, c := range containers(spec) {
			assert.Contains(t, listed, c.Image, c.Name)
		}
	}
	for _, path := range []string{"registrar/patch.yaml", "full/trivet.yaml"} {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		for _, m := range regexp.MustCompile(`(?m)^\s*image: (\S+)`).FindAllSubmatch(text, -1) {
			assert.Contains(t, listed, string(m[1]), path)
		}
	}
}

// TestFailover: who may remove pods and taint nodes runs where the flag says so, and nobody else may.
func TestFailover(t *testing.T) {
	t.Parallel()
	ctrl := container(t, podSpecs(t)["controller"], "csi-controller")
	assert.Contains(t, ctrl.Args, "--failover")
	after, err := time.ParseDuration(flag(t, ctrl, "failover-after"))
	require.NoError(t, err)
	assert.GreaterOrEqual(t, after, 12*time.Second, "a kubelet renews its Lease every ten seconds")
	may := map[string]string{}
	for _, r := range all[*rbacv1.ClusterRole](t) {
		for _, rule := range r.Rules {
			for _, resource := range rule.Resources {
				for _, verb := range rule.Verbs {
					may[verb+" "+resource] += r.Name + " "
				}
			}
		}
	}
	for _, right := range []string{
		"get nodes", "list nodes", "patch nodes", "patch nodes/status", "list pods", "delete pods", "get persistentvolumes",
		"get namespaces", "list volumeattachments", "delete volumeattachments",
	} {
		assert.Contains(t, may[right], "trivet-failover", right)
	}
	for _, right := range []string{"patch nodes/status", "delete pods", "delete volumeattachments"} {
		assert.Equal(t, "trivet-failover ", may[right], right)
	}
	assert.Equal(t, "trivet-node-labels trivet-failover ", may["patch nodes"], "taints, and topology labels")

	assert.Contains(t, ctrl.Args, "--node-labels")
	assert.Equal(t, "topology.kubernetes.io/zone", flag(t, ctrl, "zone-label"))
	assert.Contains(t, may["list nodes"], "trivet-node-labels")
}
