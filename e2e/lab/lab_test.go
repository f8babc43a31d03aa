package lab

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestConfig(t *testing.T) {
	t.Parallel()
	long := "/" + strings.Repeat("x", dirLenMax)
	for _, row := range []struct {
		name string
		cfg  Config
		want string // empty: accepted
	}{
		{"defaults", Config{}, ""},
		{"own nodes", Config{Nodes: []string{"a", "b-1"}, Zones: []string{"z", "z"}}, ""},
		{"relative folder", Config{Dir: "x"}, `"x"`},
		{"the root", Config{Dir: "/../"}, "root"},
		{"long folder", Config{Dir: long}, "sockets"},
		{"zones missing", Config{Nodes: []string{"a", "b"}, Zones: []string{"z"}}, "1 zones for 2 nodes"},
		{"node twice", Config{Nodes: []string{"a", "a"}}, `"a"`},
		{"node that leaves the folder", Config{Nodes: []string{"../a"}}, `"../a"`},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			err := row.cfg.withDefaults().Validate()
			if row.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, row.want)
		})
	}
}

func TestPlanNodes(t *testing.T) {
	t.Parallel()
	nodes := planNodes(Config{Dir: "/d/"}.withDefaults())
	require.Len(t, nodes, 3)
	require.Equal(t, node{
		Name: "n3", Index: 2, Zone: "z3", Address: "10.213.1.13", PodCIDR: "10.213.12.0/24", Root: "/d/nodes/n3",
	}, nodes[2])
	require.Less(t, len(nodes[2].link()), 16, "the kernel's limit for names of links")
}

func TestState(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	got, err := loadState(dir)
	require.NoError(t, err)
	require.Nil(t, got, "no lab is no error")

	want := &state{Boot: "b", Cache: "/c", Nodes: planNodes(Config{}.withDefaults()), LoopsOld: []int{3}}
	require.NoError(t, want.save(dir))
	got, err = loadState(dir)
	require.NoError(t, err)
	require.Equal(t, want, got)

	_, err = Open(dir, nil)
	require.ErrorContains(t, err, "no lab is up in "+dir, "one that is half made cannot be used")

	require.NoError(t, os.WriteFile(statePath(dir), []byte("{"), 0o600))
	_, err = loadState(dir)
	require.ErrorContains(t, err, statePath(dir))
	require.ErrorContains(t, Down(t.Context(), dir, nil), statePath(dir), "what cannot be read must not be deleted")
}

// TestDownAfterRestart: the processes of another boot are not ours, whatever their numbers.
func TestDownAfterRestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	me, err := identify("me", os.Getpid())
	require.NoError(t, err)
	require.NoError(t, (&state{Boot: "another", Processes: []process{me}}).save(dir))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "logs"), 0o700))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "nodes/n1"), 0o700))
	require.NoError(t, Down(t.Context(), dir, nil))
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1)
	require.Equal(t, "logs", entries[0].Name())
	require.NoError(t, Down(t.Context(), dir, nil), "twice is as good as once")
}

func TestProcess(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	cmd.Env = []string{markVariable + "=" + t.TempDir()}
	require.NoError(t, cmd.Start())
	p, err := identify("sleep", cmd.Process.Pid)
	require.NoError(t, err)
	require.True(t, p.alive())

	other := p
	other.Start++ // a process with the number of one that is gone
	require.False(t, other.alive())
	require.NoError(t, other.kill())
	require.True(t, p.alive(), "another process with the same number must not be killed")

	require.NoError(t, p.kill())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	require.NoError(t, until(ctx, "it is dead", func(context.Context) (bool, error) { return !p.alive(), nil }),
		"a dead child that nobody has asked for counts as dead")
	require.Error(t, cmd.Wait())
	require.NoError(t, p.kill())
	require.False(t, process{}.alive())
}

func TestMarked(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	cmd.Env = []string{"A=b", markVariable + "=" + dir}
	other := exec.CommandContext(t.Context(), "sleep", "600")
	other.Env = []string{markVariable + "=" + dir + "-other", "X=" + markVariable + "=" + dir}
	for _, c := range []*exec.Cmd{cmd, other} {
		require.NoError(t, c.Start())
		require.NoError(t, until(ctx, "its environment is there", func(context.Context) (bool, error) {
			env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", c.Process.Pid))
			return len(env) > 0, err // Start returns a moment before the kernel shows it
		}))
	}
	found, err := marked(dir)
	require.NoError(t, err)
	require.Len(t, found, 1)
	require.Equal(t, cmd.Process.Pid, found[0].PID)
	for _, c := range []*exec.Cmd{cmd, other} {
		require.NoError(t, c.Process.Kill())
		require.Error(t, c.Wait())
	}
}

func TestParseStat(t *testing.T) {
	t.Parallel()
	line := "42 (a ) R (b) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1000 2 18446744073709551615"
	status, start, err := parseStat([]byte(line))
	require.NoError(t, err)
	require.Equal(t, byte('S'), status)
	require.EqualValues(t, 98765, start)
	for _, bad := range []string{"", "42 a S", "42 (a) S 1"} {
		_, _, err := parseStat([]byte(bad))
		require.Error(t, err, bad)
	}
}

func TestParseMount(t *testing.T) {
	t.Parallel()
	m, err := parseMount(`36 35 0:98 / /a\040b\134 rw,noatime shared:1 master:2 - fuse.trivet trivet rw,user_id=0` + "\n")
	require.NoError(t, err)
	require.Equal(t, mount{major: 0, minor: 98, point: `/a b\`, kind: "fuse.trivet"}, m)
	require.True(t, isFuse(m))
	for _, bad := range []string{"", "36 35 0:98 / /a rw", "36 35 x:y / /a rw - ext4 /dev/x rw"} {
		_, err := parseMount(bad)
		require.Error(t, err, bad)
	}
}

func TestInNodePlace(t *testing.T) {
	t.Parallel()
	host := map[string]bool{"/run/trivet/a": true}
	require.True(t, inNodePlace("/run/trivet/b", host))
	require.True(t, inNodePlace("/var/lib/kubelet/plugins/x", host))
	require.True(t, inNodePlace("/", host), "its namespace is gone")
	require.False(t, inNodePlace("/run/trivet/a", host), "mounted on the host: of somebody else")
	require.False(t, inNodePlace("/home/disk.img", host))
}

func TestUnready(t *testing.T) {
	t.Parallel()
	text := `{"items": [
		{"metadata": {"name": "n1"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}},
		{"metadata": {"name": "n2"}, "status": {"conditions": [{"type": "Ready", "status": "False", "message": "no CNI"}]}},
		{"metadata": {"name": "n3"}, "spec": {"taints": [{"key": "node.kubernetes.io/not-ready"}]},
		 "status": {"conditions": [{"type": "Ready", "status": "True"}]}}]}`
	var list nodeList
	require.NoError(t, json.Unmarshal([]byte(text), &list))
	require.Empty(t, list.unready([]string{"n1"}))
	require.Equal(t, []string{
		"n2: no CNI", "n3: taint node.kubernetes.io/not-ready", "n4: is not registered",
	}, list.unready([]string{"n1", "n2", "n3", "n4"}))
}

func TestContainerID(t *testing.T) {
	t.Parallel()
	text := `{"status": {"containerStatuses": [{"name": "a", "containerID": "containerd://1"}, {"name": "b"}],
		"initContainerStatuses": [{"name": "sidecar", "containerID": "containerd://2"}]}}`
	var p pod
	require.NoError(t, json.Unmarshal([]byte(text), &p))
	require.Equal(t, "1", p.containerID("a"))
	require.Equal(t, "2", p.containerID("sidecar"))
	require.Empty(t, p.containerID("b"), "not started yet")
	require.Empty(t, p.containerID("c"))
}

func TestCertificates(t *testing.T) {
	t.Parallel()
	ca, err := newAuthority()
	require.NoError(t, err)
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(ca.pem))

	p, err := ca.issue(subject{name: "system:node:n1", groups: []string{"system:nodes"}})
	require.NoError(t, err)
	pair, err := tls.X509KeyPair(p.cert, p.key)
	require.NoError(t, err)
	require.Equal(t, "system:node:n1", pair.Leaf.Subject.CommonName)
	require.Equal(t, []string{"system:nodes"}, pair.Leaf.Subject.Organization)
	verify := func(c *x509.Certificate, host string, usage x509.ExtKeyUsage) error {
		_, err := c.Verify(x509.VerifyOptions{Roots: roots, DNSName: host, KeyUsages: []x509.ExtKeyUsage{usage}})
		return err
	}
	require.NoError(t, verify(pair.Leaf, "", x509.ExtKeyUsageClientAuth))
	require.Error(t, verify(pair.Leaf, "", x509.ExtKeyUsageServerAuth), "a client cannot serve")

	p, err = ca.issue(subject{name: "etcd", hosts: []string{"10.213.1.1", "etcd.lab"}})
	require.NoError(t, err)
	pair, err = tls.X509KeyPair(p.cert, p.key)
	require.NoError(t, err)
	require.NoError(t, verify(pair.Leaf, "10.213.1.1", x509.ExtKeyUsageServerAuth))
	require.NoError(t, verify(pair.Leaf, "etcd.lab", x509.ExtKeyUsageServerAuth))
	require.Error(t, verify(pair.Leaf, "10.213.1.2", x509.ExtKeyUsageServerAuth))
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "pki")
	c, err := makeCredentials(dir)
	require.NoError(t, err)
	info, err := os.Stat(dir)
	require.NoError(t, err)
	require.EqualValues(t, 0o700, info.Mode().Perm())
	for _, name := range []string{"apiserver", "etcd", "etcd-client", "kubelet-client", "controller", "scheduler"} {
		_, err := tls.LoadX509KeyPair(c.path(name+".crt"), c.path(name+".key"))
		require.NoError(t, err, name)
	}
	for _, name := range []string{"admin", "dns", "controller-manager", "kube-scheduler"} {
		client, err := newAPIClient(c.path(name + ".kubeconfig"))
		require.NoError(t, err, name)
		require.Equal(t, apiURL, client.url)
	}
	_, err = newAPIClient(c.path("ca.crt"))
	require.ErrorContains(t, err, "ca.crt")
}

func TestAPIClientTellsWhatTheServerSaid(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ok" {
			_, _ = w.Write([]byte("fine"))
			return
		}
		http.Error(w, "etcd is not ready", http.StatusInternalServerError)
	}))
	t.Cleanup(s.Close)
	client := &apiClient{url: s.URL, http: s.Client()}
	text, err := client.get(t.Context(), "/ok")
	require.NoError(t, err)
	require.Equal(t, "fine", string(text))
	_, err = client.get(t.Context(), "/readyz")
	require.ErrorContains(t, err, "etcd is not ready")
}

func TestCacheNamesWhatIsMissing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, p := range append(append([]string{}, programs...), debs...) {
		path := filepath.Join(dir, p)
		if !strings.Contains(p, "/") {
			require.NoError(t, os.WriteFile(path, nil, 0o700))
			continue
		}
		path = filepath.Join(dir, "deb", p)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		require.NoError(t, os.WriteFile(path, nil, 0o700))
	}
	require.NoError(t, cache(dir).check())
	require.NoError(t, os.Remove(filepath.Join(dir, "kubelet")))
	require.ErrorContains(t, cache(dir).check(), "kubelet; run e2e/build.sh")
	require.ErrorContains(t, cache("").check(), "build.sh")
}

func TestOutputTellsWhatWentWrong(t *testing.T) {
	t.Parallel()
	out, err := output(t.Context(), "/bin/sh", "-c", "echo yes")
	require.NoError(t, err)
	require.Equal(t, "yes\n", out)
	_, err = output(t.Context(), "/bin/sh", "-c", "echo reason >&2; exit 3")
	require.ErrorContains(t, err, "reason")
	require.ErrorContains(t, err, "exit status 3")
}
