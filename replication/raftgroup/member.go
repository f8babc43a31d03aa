package raftgroup

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

const configBytesMax = 16 << 10 // of an encoded configuration, ours or the library's

// address returns the Raft address of a replica. It names the node, never a network address, so a
// vote recorded under it stays true when the node moves (H9).
func address(id trivet.ReplicaID, node trivet.NodeID) raft.ServerAddress {
	return raft.ServerAddress(string(id) + "@" + string(node))
}

func parseAddress(a raft.ServerAddress) (trivet.ReplicaID, trivet.NodeID, error) {
	id, node, ok := strings.Cut(string(a), "@")
	if !ok {
		return "", "", fmt.Errorf("address %q: want replica@node: %w", string(a), trivet.ErrInvalid)
	}
	if err := validateReplicaID(trivet.ReplicaID(id)); err != nil {
		return "", "", err
	}
	if err := trivet.ValidateNodeID(node); err != nil {
		return "", "", err
	}
	return trivet.ReplicaID(id), trivet.NodeID(node), nil
}

func validateReplicaID(id trivet.ReplicaID) error {
	if err := trivet.ValidateUUID(string(id)); err != nil {
		return fmt.Errorf("replica: %w", err)
	}
	return nil
}

// validateMembers checks a configuration: distinct valid replicas, one voter at least.
func validateMembers(members []Member) error {
	if len(members) > MembersMax {
		return fmt.Errorf("%d members, at most %d are allowed: %w", len(members), MembersMax, trivet.ErrInvalid)
	}
	voters := 0
	seen := make(map[trivet.ReplicaID]bool, len(members))
	for _, m := range members {
		if _, _, err := parseAddress(address(m.Replica, m.Node)); err != nil {
			return err
		}
		if seen[m.Replica] {
			return fmt.Errorf("member %s is listed twice: %w", m.Replica, trivet.ErrInvalid)
		}
		seen[m.Replica] = true
		if !m.Learner {
			voters++
		}
	}
	if voters == 0 {
		return fmt.Errorf("%d members and no voter among them: %w", len(members), trivet.ErrInvalid)
	}
	return nil
}

// sortedMembers returns a copy in the order of IDs, so that every replica writes the same bytes.
func sortedMembers(members []Member) []Member {
	out := slices.Clone(members)
	slices.SortFunc(out, func(a, b Member) int { return cmp.Compare(a.Replica, b.Replica) })
	return out
}

func toConfiguration(members []Member) raft.Configuration {
	var c raft.Configuration
	for _, m := range members {
		s := raft.Server{Suffrage: raft.Voter, ID: raft.ServerID(m.Replica), Address: address(m.Replica, m.Node)}
		if m.Learner {
			s.Suffrage = raft.Nonvoter
		}
		c.Servers = append(c.Servers, s)
	}
	return c
}

// fromConfiguration is the inverse of toConfiguration. It returns ErrInvalid for a configuration
// that this package cannot have written.
func fromConfiguration(c raft.Configuration) ([]Member, error) {
	var out []Member
	for _, s := range c.Servers {
		id, node, err := parseAddress(s.Address)
		if err != nil {
			return nil, err
		}
		if string(id) != string(s.ID) {
			return nil, fmt.Errorf("server %q has the address of %q: %w", string(s.ID), string(id), trivet.ErrInvalid)
		}
		if s.Suffrage != raft.Voter && s.Suffrage != raft.Nonvoter {
			return nil, fmt.Errorf("server %q has suffrage %d: %w", string(s.ID), s.Suffrage, trivet.ErrInvalid)
		}
		out = append(out, Member{Replica: id, Node: node, Learner: s.Suffrage == raft.Nonvoter})
	}
	return out, nil
}

// decodeConfiguration decodes the library's encoding of a configuration. The library's decoder
// panics on bad bytes, and those may come from the wire (raft.go:1612), so every configuration
// passes through here before the library sees it.
func decodeConfiguration(b []byte) (members []Member, err error) {
	if len(b) > configBytesMax {
		return nil, fmt.Errorf("configuration of %d bytes, at most %d are allowed: %w",
			len(b), configBytesMax, trivet.ErrInvalid)
	}
	defer func() {
		if r := recover(); r != nil {
			members, err = nil, fmt.Errorf("configuration of %d bytes: %v: %w", len(b), r, trivet.ErrInvalid)
		}
	}()
	members, err = fromConfiguration(raft.DecodeConfiguration(b))
	if err != nil {
		return nil, err
	}
	return members, validateMembers(members)
}

func findMember(members []Member, id trivet.ReplicaID) (Member, bool) {
	for _, m := range members {
		if m.Replica == id {
			return m, true
		}
	}
	return Member{}, false
}

func voterN(members []Member) int {
	n := 0
	for _, m := range members {
		if !m.Learner {
			n++
		}
	}
	return n
}
