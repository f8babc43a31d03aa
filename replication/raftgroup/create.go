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
// Group, Replica, FS, Dir and Log of cfg only. The same call again returns nil; a directory of another
// replica, or of other members, ErrExists; one with damage or foreign files, ErrCorrupt, and so is a log
// that knows the group when its directory is gone: a replica must not lose its name and begin anew (H10).
// It may be repeated after a crash at any point.
func Create(cfg Config, members []Member) error {
	cfg = cfg.withDefaults()
	if err := cfg.validateLog(); err != nil {
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
	log := newGroupLog(cfg.Log, cfg.Group)
	if err := beginCreate(cfg.FS, cfg.Dir, log); err != nil {
		return err
	}
	if err := createContent(log, want); err != nil {
		return err
	}
	if err := writeFile(cfg.FS, cfg.Dir, fileSuper, want.encode()); err != nil {
		return err
	}
	return removeFile(cfg.FS, cfg.Dir, fileIncomplete)
}

// beginCreate leaves an empty directory, but for the marker that lets a repeated Create remove what
// a crashed one left behind, and an empty log. What no Create of ours began is never removed.
func beginCreate(fs vfs.FS, dir string, log *groupLog) error {
	if err := makeDir(fs, dir); err != nil {
		return err
	}
	names, err := fs.List(dir)
	if err != nil {
		return err
	}
	begun := slices.Contains(names, fileIncomplete)
	if !begun && !log.pristine() {
		return fmt.Errorf("the disk's log knows the group, its directory is gone; replace it by a replica with a new ID, "+
			"after destroying what is left of this one: %w", trivet.ErrCorrupt)
	}
	for _, name := range names {
		if !begun && name != fileIncomplete+tmpSuffix {
			return fmt.Errorf("file %s is there, but no superblock: %w", name, trivet.ErrCorrupt)
		}
	}
	if err := writeFile(fs, dir, fileIncomplete, nil); err != nil {
		return err
	}
	// The log first: as long as it knows the group, the marker says that these are remains.
	if err := log.DeleteGroup(); err != nil {
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

// createContent begins the group's log. A replica that joins begins in term 1 too, in which nobody ever
// leads: so a log that knows nothing of a created group has lost it (checkState).
func createContent(log *groupLog, s superblock) error {
	if err := log.SetStable(stableRecord{term: 1}.stable()); err != nil || len(s.members) == 0 {
		return err
	}
	// The entry that raft.BootstrapCluster would write: index 1 of term 1, alike on all members.
	return log.append([]*raft.Log{{
		Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(toConfiguration(s.members)),
	}})
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

// Destroy removes a closed group's directory, and its entries, term and vote from the log. It is idempotent
// and may be repeated after a crash; what a crashed one leaves behind never opens, and another Create may
// follow. It refuses the directory of another replica with ErrInvalid.
func Destroy(cfg Config) error {
	cfg = cfg.withDefaults()
	if err := cfg.validateLog(); err != nil {
		return err
	}
	if err := destroy(cfg); err != nil {
		return fmt.Errorf("destroy group %s in %s: %w", cfg.Group, cfg.Dir, err)
	}
	return nil
}

func destroy(cfg Config) error {
	log := newGroupLog(cfg.Log, cfg.Group)
	there, err := fileExists(cfg.FS, cfg.Dir)
	if err != nil {
		return err
	}
	if !there { // nobody can say any more whose log it was, or use it
		return log.DeleteGroup()
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
	if err := log.DeleteGroup(); err != nil { // before the marker goes with the directory
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
