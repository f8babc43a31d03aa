package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// What the host writes to a node's init, a byte each, over descriptor 3. An end before both have come
// means that the program that called Up is gone, and ends the node.
const (
	sayConnected    = 'n' // the cable is laid: go on
	sayStartKubelet = 'k' // the API server is ready
)

// runningNode is a node while Up still talks to its init.
type runningNode struct {
	node
	say *os.File
}

// startInit starts the init of a node in new namespaces. It waits until its network is connected.
func (c *Cluster) startInit(s starter, n node, authorized string) (*runningNode, error) {
	spec, err := json.Marshal(nodeSpec{
		Name: n.Name, Root: n.Root, Cache: string(c.cache), Logs: c.logDir(), Address: n.Address, Zone: n.Zone,
		Authorized: authorized,
	})
	if err != nil {
		return nil, fmt.Errorf("encode node %s: %w", n.Name, err)
	}
	hear, say, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe to node %s: %w", n.Name, err)
	}
	defer hear.Close() // the init has its own descriptor
	const namespaces = syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID
	p, err := s.startHelper("init-"+n.Name, "node", []string{string(spec)}, namespaces, hear)
	if err != nil {
		say.Close()
		return nil, err
	}
	r := &runningNode{node: n, say: say}
	r.Init = p
	return r, r.readNamespaces()
}

// readNamespaces notes the names of the init's namespaces, by which Down proves that none is left.
func (r *runningNode) readNamespaces() error {
	for file, to := range map[string]*string{"net": &r.NetNS, "mnt": &r.MountNS, "pid": &r.PIDNS} {
		name, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", r.Init.PID, file))
		if err != nil {
			return fmt.Errorf("read namespaces of node %s: %w", r.Name, err)
		}
		*to = name
	}
	return nil
}

func (r *runningNode) tell(what byte) error {
	if _, err := r.say.Write([]byte{what}); err != nil {
		return fmt.Errorf("talk to init of node %s: %w", r.Name, err)
	}
	return nil
}

// waitContainerd returns once the node's containerd answers.
func (c *Cluster) waitContainerd(ctx context.Context, n node) error {
	var d net.Dialer
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	return until(ctx, "containerd of node "+n.Name+" is up", func(ctx context.Context) (bool, error) {
		if !n.Init.alive() {
			err := fmt.Errorf("the init of node %s ended by itself; see %s", n.Name,
				filepath.Join(c.logDir(), n.Init.Name+".log"))
			cancel(err)
			return false, err
		}
		conn, err := d.DialContext(ctx, "unix", n.containerdSocket())
		if err != nil {
			return false, err
		}
		return true, conn.Close()
	})
}
