package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// toolsDir is where a node sees the cache.
const toolsDir = "/opt/trivet-e2e"

// pauseImage is the image of every pod's first process. The name is of no registry: nothing must ever
// try to pull it.
const pauseImage = "lab.invalid/pause:1"

// nodeSpec is what the init of a node is told.
type nodeSpec struct {
	Name    string
	Root    string
	Cache   string // from outside, as Root and Logs
	Logs    string
	Address string
	Zone    string

	Authorized string // the public key that may enter by SSH; empty: none
}

// prepareNode makes the root folder of a node: an ordinary Linux tree, with the host's /usr mounted by
// the node's init and everything that changes a folder of the node's own.
func (c *Cluster) prepareNode(cred credentials, n node) error {
	for dir, mode := range map[string]fs.FileMode{
		"dev": 0o755, "proc": 0o755, "sys": 0o755, "usr": 0o755, "mnt": 0o755, "root": 0o700, "run/trivet": 0o755,
		"tmp": 0o777 | fs.ModeSticky, "var/tmp": 0o777 | fs.ModeSticky, "var/log": 0o755, "var/lib": 0o755,
		"etc/cni/net.d": 0o755, "var/lib/kubelet": 0o755, toolsDir[1:]: 0o755, ".host": 0o755,
	} {
		path := filepath.Join(n.Root, dir)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return fmt.Errorf("make root folder of node %s: %w", n.Name, err)
		}
		if err := os.Chmod(path, mode); err != nil { // unlike that of MkdirAll, not cut by the umask
			return fmt.Errorf("make root folder of node %s: %w", n.Name, err)
		}
	}
	if err := copyLinks(n.Root); err != nil {
		return fmt.Errorf("make root folder of node %s: %w", n.Name, err)
	}
	for path, text := range nodeFiles(n) {
		if err := writeFile(filepath.Join(n.Root, path), []byte(text), 0o644); err != nil {
			return fmt.Errorf("make root folder of node %s: %w", n.Name, err)
		}
	}
	for _, path := range []string{"etc/ld.so.cache", "etc/mke2fs.conf", "etc/protocols", "etc/services"} {
		if err := copyFile("/"+path, filepath.Join(n.Root, path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("make root folder of node %s: %w", n.Name, err)
		}
	}
	return c.prepareKubelet(cred, n)
}

// copyLinks gives the root folder the links of a merged /usr. A machine that is not merged would have
// folders there; Debian 12 is always merged.
func copyLinks(root string) error {
	entries, err := os.ReadDir("/usr")
	if err != nil {
		return err
	}
	for _, e := range entries {
		top, err := os.Readlink("/" + e.Name())
		if err != nil || filepath.Join("/", top) != filepath.Join("/usr", e.Name()) {
			continue
		}
		if err := os.Symlink(filepath.Join("usr", e.Name()), filepath.Join(root, e.Name())); err != nil {
			return err
		}
	}
	return os.Symlink("/run", filepath.Join(root, "var/run"))
}

// nodeFiles are the texts of a node, by path below its root.
func nodeFiles(n node) map[string]string {
	return map[string]string{
		"etc/hostname":      n.Name + "\n",
		"etc/hosts":         "127.0.0.1 localhost\n" + n.Address + " " + n.Name + "\n",
		"etc/resolv.conf":   "nameserver " + dnsAddress + "\n",
		"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
		"etc/passwd":        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
		"etc/group":         "root:x:0:\ndisk:x:6:\ntty:x:5:\nnogroup:x:65534:\n",
		"etc/os-release":    "ID=trivet-e2e\nPRETTY_NAME=\"Trivet lab\"\n",
		// kubelet publishes it as the machine's identity, so it must differ between nodes.
		"etc/machine-id":                  fmt.Sprintf("%032x\n", n.Index+1),
		"etc/containerd.toml":             containerdConfig,
		"etc/cni/net.d/lab.json":          cniConfig(n),
		"etc/sysctl/vm.overcommit_memory": "1\n",
		"etc/sysctl/kernel.panic":         "10\n",
		"etc/sysctl/kernel.panic_on_oops": "1\n",
	}
}

// privateSysctls are settings of the whole machine that kubelet wants to change. The node gets a file
// of its own in their place, with the values that kubelet wants (its setupKernelTunables).
var privateSysctls = []string{"vm.overcommit_memory", "kernel.panic", "kernel.panic_on_oops"}

func sysctlPath(name string) string {
	return "proc/sys/" + strings.Replace(name, ".", "/", 1)
}

// containerdConfig: a machine without CAP_SYS_RESOURCE cannot lower a process's oom_score_adj, hence
// the restriction; profiles of AppArmor would be loaded into the host's kernel.
const containerdConfig = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs",
]

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pauseImage + `"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "` + toolsDir + `/deb/usr/sbin/runc"
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "` + toolsDir + `/deb/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
`

// cniConfig gives each pod a cable to its node and an address of the node's subnet. Nothing is
// translated: pods of all nodes see each other's addresses, as Kubernetes demands.
func cniConfig(n node) string {
	return `{
  "cniVersion": "0.4.0",
  "name": "lab",
  "type": "ptp",
  "ipMasq": false,
  "ipam": {
    "type": "host-local",
    "ranges": [[{"subnet": "` + n.PodCIDR + `"}]],
    "routes": [{"dst": "0.0.0.0/0"}]
  }
}
`
}

// prepareKubelet writes the kubelet's credentials and configuration.
func (c *Cluster) prepareKubelet(cred credentials, n node) error {
	dir := filepath.Join(n.Root, "etc/kubernetes")
	if err := cred.writeKubeconfig(filepath.Join(dir, "kubelet.kubeconfig"), subject{
		name: "system:node:" + n.Name, groups: []string{"system:nodes"},
	}); err != nil {
		return err
	}
	server, err := cred.ca.issue(subject{name: n.Name, hosts: []string{n.Name, n.Address}})
	if err != nil {
		return err
	}
	text, err := json.MarshalIndent(kubeletConfig(n), "", "  ")
	if err != nil {
		return fmt.Errorf("encode configuration of kubelet: %w", err)
	}
	return errors.Join(
		writeFile(filepath.Join(dir, "ca.crt"), cred.ca.pem, 0o644),
		writeFile(filepath.Join(dir, "kubelet.crt"), server.cert, 0o644),
		writeFile(filepath.Join(dir, "kubelet.key"), server.key, 0o600),
		writeFile(filepath.Join(dir, "kubelet.json"), text, 0o644),
	)
}

func kubeletConfig(n node) map[string]any {
	return map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"address": n.Address,
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false},
			"webhook":   map[string]any{"enabled": true},
			"x509":      map[string]any{"clientCAFile": "/etc/kubernetes/ca.crt"},
		},
		"authorization":            map[string]any{"mode": "Webhook"},
		"tlsCertFile":              "/etc/kubernetes/kubelet.crt",
		"tlsPrivateKeyFile":        "/etc/kubernetes/kubelet.key",
		"containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		"clusterDNS":               []string{dnsAddress}, "clusterDomain": clusterDomain,
		"resolvConf":      "/etc/resolv.conf",
		"volumePluginDir": "/var/lib/kubelet/volume-plugins",

		// A volume is detached only once the node's status no longer says that it is in use: 10 s by
		// default, which is most of the time that a pod takes to move.
		"nodeStatusUpdateFrequency": "1s",

		"cgroupDriver": "cgroupfs", "cgroupRoot": "/" + n.cgroup(),
		"failCgroupV1": false, "failSwapOn": false, "enforceNodeAllocatable": []string{},

		// All nodes share one disk and one memory, which are not the lab's to guard.
		"imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
		"evictionHard": map[string]string{
			"memory.available": "50Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%", "imagefs.available": "1%",
		},
	}
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
