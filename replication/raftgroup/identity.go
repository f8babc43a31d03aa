package raftgroup

import (
	"fmt"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
)

const (
	magicSuper    = "trvtgrp\x01"
	superBytesMax = frameBytesMax
)

// superblock says whose a directory is. It is written last by Create, so a directory that has one
// is complete, and a directory without one never opens a group (H10).
//
//	frame (encode.go) over: group u64 | replica string | bootstrap members
type superblock struct {
	group   trivet.VolumeID
	replica trivet.ReplicaID
	members []Member // the bootstrap configuration, sorted; nil when the replica waits to be added
}

func (s superblock) encode() []byte {
	b := put64(nil, uint64(s.group))
	b = putString(b, string(s.replica))
	return sealFrame(magicSuper, putMembers(b, s.members))
}

func decodeSuperblock(b []byte) (superblock, error) {
	payload, rest, err := openFrame(magicSuper, b)
	if err != nil {
		return superblock{}, err
	}
	if len(rest) != 0 {
		return superblock{}, fmt.Errorf("superblock: %d bytes too many: %w", len(rest), trivet.ErrCorrupt)
	}
	d := decoder{b: payload}
	s := superblock{group: trivet.VolumeID(d.u64()), replica: trivet.ReplicaID(d.str()), members: d.members()}
	if err := d.finish("superblock"); err != nil {
		return superblock{}, err
	}
	if err := validateReplicaID(s.replica); err != nil {
		return superblock{}, fmt.Errorf("superblock: %v: %w", err, trivet.ErrCorrupt)
	}
	return s, nil
}

// readSuperblock returns ErrNotFound when there is none.
func readSuperblock(fs vfs.FS, dir string) (superblock, error) {
	b, err := readFile(fs, dir, fileSuper, superBytesMax)
	if isNotExist(err) {
		return superblock{}, fmt.Errorf("directory %s holds no complete group: %w", dir, trivet.ErrNotFound)
	}
	if err != nil {
		return superblock{}, err
	}
	return decodeSuperblock(b)
}

// checkIdentity returns ErrInvalid unless the directory belongs to the replica of cfg (H11).
func checkIdentity(cfg Config, s superblock) error {
	if s.group != cfg.Group || s.replica != cfg.Replica {
		return fmt.Errorf("directory holds replica %s of group %s, want %s of %s: %w",
			s.replica, s.group, cfg.Replica, cfg.Group, trivet.ErrInvalid)
	}
	return nil
}
