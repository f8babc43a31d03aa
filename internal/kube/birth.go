package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/trivet-csi/trivet"
)

// Answer is what a server said when it was asked.
type Answer struct {
	Address string        // host:port
	Node    trivet.NodeID // proven by its certificate; empty when it could not be reached
	Member  bool          // it serves the catalogue of a living cluster
	Err     error         // why it is no member, as far as is known
}

// Servers are the servers of the cluster to be, or that is. *Admins are.
type Servers interface {
	// Ask asks all of them at once.
	Ask(ctx context.Context) ([]Answer, error)

	// Init gives birth to the cluster on the server at an address, which must prove to be that node. It
	// returns ErrExists when there is a cluster that the node is, or is about to be, a member of.
	Init(ctx context.Context, address string, node trivet.NodeID) error
}

// Birth says where a cluster was born.
type Birth struct {
	Cluster trivet.ClusterID
	Node    trivet.NodeID // where it was born, or the member that was found first
	Now     bool          // by this call
}

// Bear gives birth to the cluster on one of its servers, unless it has been born. The node is chosen
// once and written into the ConfigMap before anything happens on it, and a call that finds one written
// uses that node or none: two births would be two clusters that believe they are one. Any number of
// calls may run, also at once. Bear waits for servers and for the API server until ctx ends; then it
// returns ErrUnavailable, with what to do when the chosen node is lost for good.
func Bear(ctx context.Context, cluster trivet.ClusterID, maps ConfigMaps, servers Servers, log *slog.Logger,
) (Birth, error) {
	b := &birth{cluster: cluster, maps: maps, servers: servers, log: orDiscard(log)}
	w := &waiter{log: b.log, what: "a server to give birth on"}
	for {
		done, err := b.try(ctx)
		if err == nil || errors.Is(err, trivet.ErrInvalid) {
			return done, err
		}
		if more, why := w.again(ctx, err); !more {
			return Birth{}, b.gaveUp(why)
		}
	}
}

// birth is a call of Bear.
type birth struct {
	cluster trivet.ClusterID
	maps    ConfigMaps
	servers Servers
	log     *slog.Logger

	chosen trivet.NodeID // as last read or written
}

func (b *birth) gaveUp(last error) error {
	last = unavailable(last)
	if b.chosen == "" {
		return fmt.Errorf("give birth to cluster %s: gave up: %w", b.cluster, last)
	}
	return fmt.Errorf("give birth to cluster %s: gave up on node %s, which was chosen for it (if it is lost for good and "+
		"no server is a member of the cluster, remove the key %s from the ConfigMap %s and run this again): %w",
		b.cluster, b.chosen, KeyBirthNode, ConfigMapName, last)
}

// try makes one round. Its errors are reasons to wait, except ErrInvalid.
func (b *birth) try(ctx context.Context) (Birth, error) {
	m, err := b.maps.ConfigMap(ctx, ConfigMapName)
	if err != nil {
		return Birth{}, err
	}
	b.chosen = trivet.NodeID(m.Data[KeyBirthNode])
	if born := m.Data[KeyBorn]; born != "" {
		if born != string(b.cluster) {
			return Birth{}, fmt.Errorf("the ConfigMap %s says that cluster %s was born, the ca is of %s; to begin a new "+
				"cluster delete the ConfigMap: %w", ConfigMapName, born, b.cluster, trivet.ErrInvalid)
		}
		return Birth{Cluster: b.cluster, Node: b.chosen}, nil
	}
	answers, err := b.servers.Ask(ctx)
	if err != nil {
		return Birth{}, err
	}
	if i := slices.IndexFunc(answers, func(a Answer) bool { return a.Member }); i >= 0 {
		return b.record(ctx, m, answers[i].Node, false)
	}
	if b.chosen == "" {
		if err := b.choose(ctx, m, answers); err != nil {
			return Birth{}, err
		}
	}
	return b.bearOn(ctx, m, answers)
}

// choose writes which node it will be, before anything is done there. When another call wrote one
// first, that is an error, and the next round finds it.
func (b *birth) choose(ctx context.Context, m *corev1.ConfigMap, answers []Answer) error {
	reachable := slices.DeleteFunc(slices.Clone(answers), func(a Answer) bool { return a.Node == "" })
	if len(reachable) == 0 {
		return fmt.Errorf("no server answers (%s): %w", describe(answers), trivet.ErrUnavailable)
	}
	first := slices.MinFunc(reachable, func(x, y Answer) int { return cmp.Compare(x.Node, y.Node) })
	set(m, KeyBirthNode, string(first.Node))
	if err := b.maps.UpdateConfigMap(ctx, m); err != nil {
		return err
	}
	b.chosen = first.Node
	b.log.Info("chose the node to give birth on", "node", string(first.Node))
	return nil
}

// bearOn gives birth on the chosen node.
func (b *birth) bearOn(ctx context.Context, m *corev1.ConfigMap, answers []Answer) (Birth, error) {
	i := slices.IndexFunc(answers, func(a Answer) bool { return a.Node == b.chosen })
	if i < 0 {
		return Birth{}, fmt.Errorf("node %s, chosen for it, does not answer (%s): %w", b.chosen, describe(answers),
			trivet.ErrUnavailable)
	}
	err := b.servers.Init(ctx, answers[i].Address, b.chosen)
	if err != nil && !errors.Is(err, trivet.ErrExists) {
		return Birth{}, fmt.Errorf("on node %s: %w", b.chosen, err)
	}
	return b.record(ctx, m, b.chosen, err == nil)
}

// record writes that the cluster lives, so that nothing is born after this.
func (b *birth) record(ctx context.Context, m *corev1.ConfigMap, node trivet.NodeID, now bool) (Birth, error) {
	if b.chosen == "" {
		set(m, KeyBirthNode, string(node))
	}
	set(m, KeyBorn, string(b.cluster))
	if err := b.maps.UpdateConfigMap(ctx, m); err != nil {
		return Birth{}, err
	}
	return Birth{Cluster: b.cluster, Node: node, Now: now}, nil
}

func set(m *corev1.ConfigMap, key, value string) {
	if m.Data == nil {
		m.Data = map[string]string{}
	}
	m.Data[key] = value
}

// describe says what answered and what did not, the same each time while that does not change.
func describe(answers []Answer) string {
	if len(answers) == 0 {
		return "no addresses"
	}
	var parts []string
	for _, a := range answers {
		if a.Node != "" {
			parts = append(parts, fmt.Sprintf("%s is node %s", a.Address, a.Node))
		} else {
			parts = append(parts, fmt.Sprintf("%s: %v", a.Address, a.Err))
		}
	}
	slices.Sort(parts)
	return strings.Join(parts, "; ")
}
