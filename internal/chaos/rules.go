package main

import (
	"fmt"
	"slices"
	"strings"
)

// link is the way from one node to another.
type link struct{ from, to int }

// linksCut returns the links that a fault of the network cuts, of n nodes.
func linksCut(e event, n int) map[link]bool {
	cut := map[link]bool{}
	both := func(a, b int) { cut[link{a, b}], cut[link{b, a}] = true, true }
	switch e.Class {
	case classPartition:
		for other := range n {
			if other != e.Nodes[0] {
				both(e.Nodes[0], other)
			}
		}
	case classOneWay:
		cut[link{from: e.Nodes[0], to: e.Nodes[1]}] = true
	case classBridge:
		var rest []int
		for other := range n {
			if other != e.Nodes[0] {
				rest = append(rest, other)
			}
		}
		for i, a := range rest {
			for _, b := range rest[i+1:] {
				if slices.Index(rest, a) < len(rest)/2 && slices.Index(rest, b) >= len(rest)/2 {
					both(a, b)
				}
			}
		}
	default:
	}
	return cut
}

// ruleset is what nft loads inside the namespace of node to: it replaces what was there in one step. Packets
// are dropped where they arrive, so one direction can be cut alone. There is no netem in many kernels;
// numgen gives random loss.
func ruleset(to, n int, cut map[link]bool, lossPercent int) string {
	var b strings.Builder
	b.WriteString("table inet chaos {}\nflush table inet chaos\ntable inet chaos {\n\tchain in {\n")
	b.WriteString("\t\ttype filter hook input priority 0; policy accept;\n\t\tiifname \"lo\" accept\n")
	for from := range n {
		if cut[link{from, to}] {
			fmt.Fprintf(&b, "\t\tip saddr %s drop\n", nodeIP(from))
		}
	}
	if lossPercent > 0 {
		fmt.Fprintf(&b, "\t\tnumgen random mod 100 < %d drop\n", lossPercent)
	}
	b.WriteString("\t}\n}\n")
	return b.String()
}

// nodeIP is the address of a node in the network of the run, which exists in its namespaces only.
func nodeIP(node int) string { return fmt.Sprintf("10.214.0.%d", node+1) }
