package raftgroup

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// Create makes the group's directory with its identity durable, and, if members is not empty, the
// bootstrap configuration: the same on every member, this replica among them. It uses the fields
// Group, Replica, FS and Dir of cfg only. The same call again returns nil; a directory of another
// replica, or of other members, ErrExists; one with damage or foreign files, ErrCorrupt. It may be
// repeated after a crash at any point.
func Create(cfg Config, members []Member) error {
	cfg = cfg.withDefaults()
	if err := cfg.validateStore(); err != nil {
		return err
	}
	if len(members) > 0 {
		if err := validateMembers(members); err != nil {
			return fmt.Errorf("create group %s: %w", cfg.Group, err)
		}
		if _, ok := findMember(members, cfg.Replica); !ok {
			return fmt.Errorf("create group %s: replica %s is not among its members: %w",
				cfg.Group, cfg.Replica, trivet.ErrInvalid)
		}
	}
	want := superblock{group: cfg.Group, replica: cfg.Replica, members: sortedMembers(members)}
	if err := create(cfg, want); err != nil {
		return fmt.Errorf("create group %s in %s: %w", cfg.Group, cfg.Dir, err)
	}
	return nil
}

func create(cfg Config, want superblock) error {
	got, err := readSuperblock(cfg.FS, cfg.Dir)
	switch {
	case err == nil:
		if got.group != want.group || got.replica != want.replica || !slices.Equal(got.members, want.members) {
			return fmt.Errorf("directory holds replica %s of group %s with %d members: %w",
				got.replica, got.group, len(got.members), trivet.ErrExists)
		}
		return removeFile(cfg.FS, cfg.Dir, fileIncomplete)
	case !errors.Is(err, trivet.ErrNotFound):
		return err
	}
	if err := beginCreate(cfg.FS, cfg.Dir); err != nil {
		return err
	}
	if err := createContent(cfg, want); err != nil {
		return err
	}
	if err := writeFile(cfg.FS, cfg.Dir, fileSuper, want.encode()); err != nil {
		return err
	}
	return removeFile(cfg.FS, cfg.Dir, fileIncomplete)
}

// beginCreate leaves an empty directory, but for the marker that lets a repeated Create remove what
// a crashed one left behind. Files that no Create of ours began are never removed.
func beginCreate(fs vfs.FS, dir string) error {
	if err := makeDir(fs, dir); err != nil {
		return err
	}
	names, err := fs.List(dir)
	if err != nil {
		return err
	}
	ours := len(names) == 0 || slices.Contains(names, fileIncomplete)
	for _, name := range names {
		if !ours && name != fileIncomplete+tmpSuffix {
			return fmt.Errorf("file %s is there, but no superblock: %w", name, trivet.ErrCorrupt)
		}
	}
	if err := writeFile(fs, dir, fileIncomplete, nil); err != nil {
		return err
	}
	return removeContent(fs, dir)
}

// removeContent removes all but the marker, durably. The marker goes last, so that what a crash
// leaves is known to be remains.
func removeContent(fs vfs.FS, dir string) error {
	names, err := fs.List(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == fileIncomplete {
			continue
		}
		if err := fs.RemoveAll(fs.PathJoin(dir, name)); err != nil {
			return err
		}
	}
	return syncDir(fs, dir)
}

func createContent(cfg Config, s superblock) error {
	var term uint64
	if len(s.members) > 0 {
		term = 1
	}
	vote := stableRecord{term: term}
	if err := createSlots(cfg.FS, cfg.Dir, fileStable, magicStable, vote.encode()); err != nil {
		return err
	}
	if err := createSlots(cfg.FS, cfg.Dir, fileMark, magicMark, put64(nil, 0, 0)); err != nil {
		return err
	}
	l, err := createLog(logOptions{fs: cfg.FS, dir: cfg.Dir, group: cfg.Group, segmentBytes: cfg.SegmentBytes})
	if err != nil {
		return err
	}
	if len(s.members) > 0 {
		// The entry that raft.BootstrapCluster would write: index 1 of term 1, alike on all members.
		err = l.append([]*raft.Log{{
			Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(toConfiguration(s.members)),
		}})
	}
	return errors.Join(err, l.close())
}

// Exists reports whether Dir holds a completely created group for cfg.Group and cfg.Replica.
// It returns ErrInvalid when it holds another's, and ErrCorrupt when it cannot tell.
func Exists(cfg Config) (bool, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validateStore(); err != nil {
		return false, err
	}
	s, err := readSuperblock(cfg.FS, cfg.Dir)
	if errors.Is(err, trivet.ErrNotFound) {
		return false, nil
	}
	if err == nil {
		err = checkIdentity(cfg, s)
	}
	if err != nil {
		return false, fmt.Errorf("look for group %s in %s: %w", cfg.Group, cfg.Dir, err)
	}
	return true, nil
}

// Destroy removes a closed group's directory. It is idempotent and may be repeated after a crash;
// what a crashed one leaves behind never opens, and another Create may follow. It refuses the
// directory of another replica with ErrInvalid.
func Destroy(cfg Config) error {
	cfg = cfg.withDefaults()
	if err := cfg.validateStore(); err != nil {
		return err
	}
	if err := destroy(cfg); err != nil {
		return fmt.Errorf("destroy group %s in %s: %w", cfg.Group, cfg.Dir, err)
	}
	return nil
}

func destroy(cfg Config) error {
	there, err := fileExists(cfg.FS, cfg.Dir)
	if err != nil || !there {
		return err
	}
	s, err := readSuperblock(cfg.FS, cfg.Dir)
	if err == nil {
		err = checkIdentity(cfg, s)
	}
	// A superblock that cannot be read is no reason to keep what the catalogue wants gone.
	if err != nil && !errors.Is(err, trivet.ErrNotFound) && !errors.Is(err, trivet.ErrCorrupt) {
		return err
	}
	// First the superblock: a directory that lost its log but kept its identity could vote (H10).
	if err := writeFile(cfg.FS, cfg.Dir, fileIncomplete, nil); err != nil {
		return err
	}
	if err := removeFile(cfg.FS, cfg.Dir, fileSuper); err != nil {
		return err
	}
	if err := removeContent(cfg.FS, cfg.Dir); err != nil {
		return err
	}
	if err := cfg.FS.RemoveAll(cfg.Dir); err != nil {
		return err
	}
	return syncDir(cfg.FS, cfg.FS.PathDir(cfg.Dir))
}
