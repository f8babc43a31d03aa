package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// hierarchies returns the mount points of cgroup hierarchies: one a controller with version 1, one for
// all with version 2.
func hierarchies() ([]string, error) {
	mounts, err := readMounts("self")
	if err != nil {
		return nil, err
	}
	var roots []string
	for _, m := range mounts {
		if (m.kind == "cgroup" || m.kind == "cgroup2") && strings.HasPrefix(m.point, "/sys/fs/cgroup") {
			roots = append(roots, m.point)
		}
	}
	if len(roots) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted below /sys/fs/cgroup")
	}
	return roots, nil
}

// makeCgroups makes the node's cgroup in every hierarchy; kubelet wants to find it there.
func makeCgroups(n node) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		at := root
		for part := range strings.SplitSeq(n.cgroup(), "/") {
			if err := delegate(at); err != nil {
				return err
			}
			at = filepath.Join(at, part)
			if err := os.Mkdir(at, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("make cgroup: %w", err)
			}
			if err := inheritCPUs(at); err != nil {
				return err
			}
		}
		if err := delegate(at); err != nil {
			return err
		}
	}
	return nil
}

// delegate lets the children of a version 2 cgroup use every controller that it has itself.
func delegate(at string) error {
	text, err := os.ReadFile(filepath.Join(at, "cgroup.controllers"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // version 1
	}
	if err != nil {
		return fmt.Errorf("read controllers of cgroup: %w", err)
	}
	for _, c := range strings.Fields(string(text)) {
		if err := os.WriteFile(filepath.Join(at, "cgroup.subtree_control"), []byte("+"+c), 0o644); err != nil {
			return fmt.Errorf("delegate cgroup controller %s: %w", c, err)
		}
	}
	return nil
}

// inheritCPUs fills in what a new cpuset of version 1 leaves empty; an empty one admits no process.
func inheritCPUs(at string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		if _, err := os.Stat(filepath.Join(filepath.Dir(at), file)); err != nil {
			continue // not this controller, or the root of version 2, which has no such file
		}
		own, err := os.ReadFile(filepath.Join(at, file))
		if err != nil || strings.TrimSpace(string(own)) != "" {
			continue
		}
		text, err := os.ReadFile(filepath.Join(filepath.Dir(at), file))
		if err != nil {
			return fmt.Errorf("read cpuset: %w", err)
		}
		if err := os.WriteFile(filepath.Join(at, file), text, 0o644); err != nil {
			return fmt.Errorf("fill in cpuset: %w", err)
		}
	}
	return nil
}

// cgroupPIDs returns the processes, numbered as on the host, of the cgroup of a container below a
// node's cgroup.
func cgroupPIDs(below, id string) ([]int, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	for _, root := range roots {
		var pids []int
		err := filepath.WalkDir(filepath.Join(root, below), func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil //nolint:nilerr // a cgroup may vanish while we walk
			}
			if !d.IsDir() || d.Name() != id {
				return nil
			}
			text, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			if err != nil {
				return fmt.Errorf("read processes of container %s: %w", id, err)
			}
			for f := range strings.FieldsSeq(string(text)) {
				if pid, err := strconv.Atoi(f); err == nil {
					pids = append(pids, pid)
				}
			}
			return fs.SkipAll
		})
		if err != nil {
			return nil, err
		}
		if len(pids) > 0 {
			return pids, nil
		}
	}
	return nil, fmt.Errorf("container %s: has no cgroup below %s, or an empty one", id, below)
}

// labCgroups returns what exists of the lab's cgroups, children before parents.
func labCgroups() ([]string, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, root := range roots {
		var here []string
		_ = filepath.WalkDir(filepath.Join(root, cgroupName), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				here = append(here, path)
			}
			return nil // a cgroup may vanish while we walk
		})
		slices.Reverse(here)
		found = append(found, here...)
	}
	return found, nil
}

// removeCgroups removes the cgroups that are empty; one with a process left in it stays.
func removeCgroups() error {
	found, err := labCgroups()
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range found {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove cgroup: %w", err))
		}
	}
	return errors.Join(errs...)
}
