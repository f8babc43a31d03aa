package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	apiWait   = 2 * time.Minute
	nodesWait = 3 * time.Minute
)

// up brings everything up. What it starts or makes is in the state before the next thing is begun.
func (c *Cluster) up(ctx context.Context) error {
	began := time.Now()
	step := func(what string) {
		c.log.Info("step is done", "step", what, "after", time.Since(began).Round(100*time.Millisecond))
	}
	if err := os.MkdirAll(c.logDir(), 0o755); err != nil {
		return fmt.Errorf("make folder of logs: %w", err)
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	loops, err := loopsInUse()
	if err != nil {
		return err
	}
	st := &state{Boot: boot, Cache: string(c.cache), Nodes: c.nodes, LoopsOld: loops}
	if err := st.save(c.dir); err != nil {
		return err
	}
	u := &upping{Cluster: c, st: st, start: starter{dir: c.dir}}

	if err := u.prepare(ctx); err != nil {
		return err
	}
	step("host is prepared")
	if err := u.startNodes(ctx); err != nil {
		return err
	}
	defer u.closePipes()
	step("nodes are started")
	var images errgroup.Group // of its own context: it ends with the containerds, which Down kills
	images.Go(func() error { return u.loadBaseImages(ctx) })
	err = u.startControlPlane(ctx, step)
	if err == nil {
		err = u.startKubelets()
	}
	if errImages := images.Wait(); err == nil {
		err = errImages
	}
	if err != nil {
		return err
	}
	step("images are loaded")
	if err := u.waitReady(ctx); err != nil {
		return err
	}
	step("every node is ready")
	u.st.Complete = true
	return u.st.save(c.dir)
}

// upping is a cluster while it is being made.
type upping struct {
	*Cluster
	st      *state
	start   starter
	cred    credentials
	running []*runningNode

	authorized string // the key that may enter nodes by SSH; empty: none
}

// prepare makes what needs no process: folders, certificates, cgroups, the bridge.
func (u *upping) prepare(ctx context.Context) error {
	var err error
	if u.cred, err = makeCredentials(filepath.Join(u.dir, "pki")); err != nil {
		return err
	}
	if u.ssh {
		if u.authorized, err = u.makeSSHKey(); err != nil {
			return err
		}
	}
	for _, n := range u.nodes {
		if err := u.prepareNode(u.cred, n); err != nil {
			return err
		}
		if u.ssh {
			if err := prepareTools(n); err != nil {
				return err
			}
		}
		if err := makeCgroups(n); err != nil {
			return err
		}
	}
	return makeBridge(ctx)
}

// startNodes starts the init of each node and connects it; containerd comes up by itself then.
func (u *upping) startNodes(ctx context.Context) error {
	for i, n := range u.nodes {
		r, err := u.startInit(u.start, n, u.authorized)
		if r != nil {
			u.running = append(u.running, r)
			u.nodes[i] = r.node
			u.st.Nodes = u.nodes
		}
		if err != nil {
			return err
		}
		if err := u.st.save(u.dir); err != nil {
			return err
		}
		if err := connect(ctx, r.node, u.nodes); err != nil {
			return err
		}
		if err := r.tell(sayConnected); err != nil {
			return err
		}
	}
	return nil
}

func (u *upping) closePipes() {
	for _, r := range u.running {
		r.say.Close()
	}
}

func (u *upping) loadBaseImages(ctx context.Context) error {
	archives, err := u.writeBaseImages(ctx)
	if err != nil {
		return err
	}
	for _, n := range u.nodes {
		if err := u.waitContainerd(ctx, n); err != nil {
			return err
		}
	}
	for _, a := range archives {
		if err := u.LoadImage(ctx, a); err != nil {
			return err
		}
	}
	return nil
}

// startProcess starts a process of the host and notes it.
func (u *upping) startProcess(name string, argv []string) (process, error) {
	p, err := u.start.start(name, argv, nil, 0)
	if err != nil {
		return p, err
	}
	u.st.Processes = append(u.st.Processes, p)
	return p, u.st.save(u.dir)
}

func (u *upping) startControlPlane(ctx context.Context, step func(string)) error {
	ctx, cancel := context.WithTimeout(ctx, apiWait)
	defer cancel()
	if _, err := u.startProcess("etcd", u.etcdArgs()); err != nil {
		return err
	}
	api, err := u.startProcess("kube-apiserver", u.apiserverArgs())
	if err != nil {
		return err
	}
	if err := u.waitAPI(ctx, api); err != nil {
		return err
	}
	step("API server is ready")
	if _, err := u.startProcess("kube-controller-manager", u.controllerManagerArgs()); err != nil {
		return err
	}
	if _, err := u.startProcess("kube-scheduler", u.schedulerArgs()); err != nil {
		return err
	}
	p, err := u.start.startHelper("dns", "dns", []string{u.cred.path("dns.kubeconfig"), dnsAddress + ":53"}, 0)
	if err != nil {
		return err
	}
	u.st.Processes = append(u.st.Processes, p)
	return u.st.save(u.dir)
}

func (u *upping) startKubelets() error {
	for _, r := range u.running {
		if err := r.tell(sayStartKubelet); err != nil {
			return err
		}
	}
	return nil
}

// nodeList is what is read of a NodeList.
type nodeList struct {
	Items []struct {
		Metadata objectMeta `json:"metadata"`
		Spec     struct {
			Taints []struct {
				Key string `json:"key"`
			} `json:"taints"`
		} `json:"spec"`
		Status struct {
			Conditions []struct {
				Type    string `json:"type"`
				Status  string `json:"status"`
				Message string `json:"message"`
			} `json:"conditions"`
		} `json:"status"`
	} `json:"items"`
}

// unready lists what keeps the nodes from taking pods; none means they take them.
func (l nodeList) unready(want []string) []string {
	reasons := map[string]string{}
	for _, n := range want {
		reasons[n] = "is not registered"
	}
	for _, n := range l.Items {
		reasons[n.Metadata.Name] = "has no condition Ready"
		for _, c := range n.Status.Conditions {
			if c.Type == "Ready" {
				reasons[n.Metadata.Name] = c.Message
			}
			if c.Type == "Ready" && c.Status == "True" {
				delete(reasons, n.Metadata.Name)
			}
		}
		for _, t := range n.Spec.Taints {
			reasons[n.Metadata.Name] += " taint " + t.Key
		}
	}
	var list []string
	for _, n := range want {
		if why, ok := reasons[n]; ok {
			list = append(list, n+": "+strings.TrimSpace(why))
		}
	}
	return list
}

// waitReady returns once every node takes pods and the default namespace has its service account and
// the certificate of the authority, without which no pod can be made.
func (u *upping) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, nodesWait)
	defer cancel()
	client, err := newAPIClient(u.Kubeconfig())
	if err != nil {
		return err
	}
	return until(ctx, "every node is ready", func(ctx context.Context) (bool, error) {
		text, err := client.get(ctx, "/api/v1/nodes")
		if err != nil {
			return false, err
		}
		var list nodeList
		if err := json.Unmarshal(text, &list); err != nil {
			return false, fmt.Errorf("read nodes: %w", err)
		}
		if why := list.unready(u.Nodes()); len(why) > 0 {
			return false, fmt.Errorf("not ready: %s", strings.Join(why, "; "))
		}
		for _, path := range []string{"serviceaccounts/default", "configmaps/kube-root-ca.crt"} {
			if _, err := client.get(ctx, "/api/v1/namespaces/default/"+path); err != nil {
				return false, err
			}
		}
		return true, nil
	})
}
