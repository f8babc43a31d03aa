package lab

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// The network: a bridge on the host, a cable (veth) to every node, and a route to every node's pods by
// way of the node. Frames between nodes pass the bridge, so the host forwards no packet and none of
// its settings is changed.

func ip(ctx context.Context, args string) error {
	_, err := output(ctx, append([]string{"ip"}, strings.Fields(args)...)...)
	return err
}

func ipAll(ctx context.Context, commands ...string) error {
	for _, args := range commands {
		if err := ip(ctx, args); err != nil {
			return err
		}
	}
	return nil
}

// makeBridge makes the bridge, with the addresses of host, API server and name server. Its MAC address is set: otherwise
// the kernel takes the lowest of its cables', and when the node of that one dies, the others go on sending to an address
// that nobody has, for as long as their neighbour tables hold it (half a minute and more).
func makeBridge(ctx context.Context) error {
	err := ipAll(ctx,
		"link add "+bridgeName+" address "+bridgeMAC+" type bridge",
		"addr add "+hostAddress+"/24 dev "+bridgeName,
		"addr add "+apiAddress+"/32 dev "+bridgeName,
		"addr add "+dnsAddress+"/32 dev "+bridgeName,
		"link set "+bridgeName+" up",
	)
	if err != nil {
		return fmt.Errorf("make bridge: %w", err)
	}
	return nil
}

// connect lays the cable of a node whose init waits in its own network namespace.
func connect(ctx context.Context, n node, others []node) error {
	pid := strconv.Itoa(n.Init.PID)
	err := ipAll(ctx,
		"link add "+n.link()+" type veth peer name eth0 netns "+pid,
		"link set "+n.link()+" master "+bridgeName+" up",
		"route add "+n.PodCIDR+" via "+n.Address+" dev "+bridgeName,
	)
	if err != nil {
		return fmt.Errorf("connect node %s: %w", n.Name, err)
	}
	inside := []string{
		"link set lo up",
		"addr add " + n.Address + "/24 dev eth0",
		"link set eth0 up",
		"route add default via " + hostAddress,
	}
	for _, o := range others {
		if o.Name != n.Name {
			inside = append(inside, "route add "+o.PodCIDR+" via "+o.Address)
		}
	}
	for _, args := range inside {
		argv := append([]string{"nsenter", "--target", pid, "--net", "--", "ip"}, strings.Fields(args)...)
		if _, err := output(ctx, argv...); err != nil {
			return fmt.Errorf("connect node %s: %w", n.Name, err)
		}
	}
	return nil
}

// removeLinks removes cables and bridge. What is gone already is no error.
func removeLinks(ctx context.Context, nodes []node) error {
	for _, name := range labLinks(nodes) {
		if !linkExists(name) {
			continue
		}
		if err := ip(ctx, "link del "+name); err != nil && linkExists(name) {
			return fmt.Errorf("remove link: %w", err)
		}
	}
	return nil
}

func labLinks(nodes []node) []string {
	names := make([]string, 0, len(nodes)+1)
	for _, n := range nodes {
		names = append(names, n.link())
	}
	return append(names, bridgeName)
}
