package lab

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
)

// The addresses of a lab. They are fixed: certificates, kubeconfigs and manifests of tests may name
// them.
//
//	10.213.0.0/24      Services; .1 the API server, .10 the name server, both on the bridge
//	10.213.1.0/24      machines; .1 the host, .11 the first node
//	10.213.10+i.0/24   pods of node i
const (
	labNetwork     = "10.213.0.0/16"
	serviceNetwork = "10.213.0.0/24"
	apiAddress     = "10.213.0.1"
	dnsAddress     = "10.213.0.10"
	hostAddress    = "10.213.1.1"
	apiURL         = "https://" + apiAddress + ":443"
	clusterDomain  = "cluster.local"

	bridgeName = "tve2e"
	bridgeMAC  = "02:00:0a:d5:00:01" // of our own making (bit 1 of the first byte): 10.213.0.1
	cgroupName = "trivet-e2e"

	nodesMax = 100
)

// node is what is known of a node. PID and the namespaces are those of its init, zero before it runs.
type node struct {
	Name    string  `json:"name"`
	Index   int     `json:"index"` // from 0
	Zone    string  `json:"zone"`
	Address string  `json:"address"`
	PodCIDR string  `json:"podCIDR"`
	Root    string  `json:"root"` // its root folder, seen from the host
	Init    process `json:"init"`
	NetNS   string  `json:"netNS"` // such as net:[4026532281]
	MountNS string  `json:"mountNS"`
	PIDNS   string  `json:"pidNS"`
}

// link is the host's end of the node's cable.
func (n node) link() string { return fmt.Sprintf("%s-%d", bridgeName, n.Index+1) }

func (n node) cgroup() string { return cgroupName + "/" + n.Name }

func (n node) containerdSocket() string {
	return filepath.Join(n.Root, "run/containerd/containerd.sock")
}

func planNodes(cfg Config) []node {
	nodes := make([]node, 0, len(cfg.Nodes))
	for i, name := range cfg.Nodes {
		nodes = append(nodes, node{
			Name:    name,
			Index:   i,
			Zone:    cfg.Zones[i],
			Address: fmt.Sprintf("10.213.1.%d", 11+i),
			PodCIDR: fmt.Sprintf("10.213.%d.0/24", 10+i),
			Root:    filepath.Join(filepath.Clean(cfg.Dir), "nodes", name),
		})
	}
	return nodes
}

// checkFree fails when something of another lab, or of the machine's own network, is in the way.
func checkFree(dir string) error {
	links, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list network links: %w", err)
	}
	lab := netip.MustParsePrefix(labNetwork)
	for _, l := range links {
		if l.Name == bridgeName {
			return fmt.Errorf("link %s is there: a lab is up elsewhere than in %s; end it with `lab down --dir ITS-FOLDER`",
				bridgeName, dir)
		}
		addrs, err := l.Addrs()
		if err != nil {
			return fmt.Errorf("list addresses of %s: %w", l.Name, err)
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Overlaps(lab) {
				return fmt.Errorf("address %s of link %s overlaps %s, which the lab uses", p, l.Name, lab)
			}
		}
	}
	return nil
}
