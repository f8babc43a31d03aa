package lab

import (
	"context"
	"fmt"
	"path/filepath"
)

// The processes of the control plane run on the host and listen on the bridge, so that nodes and pods
// reach them and nothing outside the machine does.

func (c *Cluster) etcdArgs() []string {
	pki := filepath.Join(c.dir, "pki")
	client := "https://" + hostAddress + ":2379"
	peer := "https://" + hostAddress + ":2380"
	return []string{
		c.cache.program("etcd"), "--name=lab", "--data-dir=" + filepath.Join(c.dir, "etcd"),
		"--listen-client-urls=" + client, "--advertise-client-urls=" + client,
		"--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer, "--initial-cluster=lab=" + peer,
		"--client-cert-auth", "--trusted-ca-file=" + pki + "/ca.crt",
		"--cert-file=" + pki + "/etcd.crt", "--key-file=" + pki + "/etcd.key",
		"--peer-client-cert-auth", "--peer-trusted-ca-file=" + pki + "/ca.crt",
		"--peer-cert-file=" + pki + "/etcd.crt", "--peer-key-file=" + pki + "/etcd.key",
		"--unsafe-no-fsync", // the lab's state is worth nothing after a crash of the machine
		"--log-level=warn",
	}
}

// apiserverArgs leaves every admission plugin that is on by default on.
func (c *Cluster) apiserverArgs() []string {
	pki := filepath.Join(c.dir, "pki")
	return []string{
		c.cache.program("kube-apiserver"),
		"--bind-address=" + apiAddress, "--secure-port=443", "--advertise-address=" + apiAddress,
		"--service-cluster-ip-range=" + serviceNetwork,
		// The address of the Service is on the bridge; an endpoint would be its own only one.
		"--endpoint-reconciler-type=none",
		"--etcd-servers=https://" + hostAddress + ":2379", "--etcd-cafile=" + pki + "/ca.crt",
		"--etcd-certfile=" + pki + "/etcd-client.crt", "--etcd-keyfile=" + pki + "/etcd-client.key",
		"--tls-cert-file=" + pki + "/apiserver.crt", "--tls-private-key-file=" + pki + "/apiserver.key",
		"--client-ca-file=" + pki + "/ca.crt",
		"--kubelet-certificate-authority=" + pki + "/ca.crt",
		"--kubelet-client-certificate=" + pki + "/kubelet-client.crt",
		"--kubelet-client-key=" + pki + "/kubelet-client.key",
		"--kubelet-preferred-address-types=InternalIP",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true",
		"--service-account-issuer=https://kubernetes.default.svc." + clusterDomain,
		"--service-account-key-file=" + pki + "/tokens.pub",
		"--service-account-signing-key-file=" + pki + "/tokens.key",
	}
}

func (c *Cluster) controllerManagerArgs() []string {
	pki := filepath.Join(c.dir, "pki")
	kubeconfig := pki + "/controller-manager.kubeconfig"
	return []string{
		c.cache.program("kube-controller-manager"),
		"--kubeconfig=" + kubeconfig, "--authentication-kubeconfig=" + kubeconfig,
		"--authorization-kubeconfig=" + kubeconfig,
		"--bind-address=" + hostAddress, "--tls-cert-file=" + pki + "/controller.crt",
		"--tls-private-key-file=" + pki + "/controller.key",
		"--root-ca-file=" + pki + "/ca.crt", "--service-account-private-key-file=" + pki + "/tokens.key",
		"--use-service-account-credentials", "--leader-elect=false",
		"--allocate-node-cidrs=false", // CNI's configuration of each node has its subnet
	}
}

func (c *Cluster) schedulerArgs() []string {
	pki := filepath.Join(c.dir, "pki")
	kubeconfig := pki + "/kube-scheduler.kubeconfig"
	return []string{
		c.cache.program("kube-scheduler"),
		"--kubeconfig=" + kubeconfig, "--authentication-kubeconfig=" + kubeconfig,
		"--authorization-kubeconfig=" + kubeconfig,
		"--bind-address=" + hostAddress, "--tls-cert-file=" + pki + "/scheduler.crt",
		"--tls-private-key-file=" + pki + "/scheduler.key",
		"--leader-elect=false",
	}
}

// waitAPI returns once the API server says that it is ready. p is its process: when that has died,
// waiting is in vain.
func (c *Cluster) waitAPI(ctx context.Context, p process) error {
	client, err := newAPIClient(c.Kubeconfig())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	return until(ctx, "the API server is ready", func(ctx context.Context) (bool, error) {
		if !p.alive() {
			err := fmt.Errorf("kube-apiserver ended by itself; see %s", filepath.Join(c.logDir(), p.Name+".log"))
			cancel(err)
			return false, err
		}
		_, err := client.get(ctx, "/readyz")
		return err == nil, err
	})
}
