package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// state is what [Down] needs to know, written to the lab's folder after every step of [Up], so that a
// lab whose program was killed half-way can be removed as well as a complete one.
type state struct {
	Boot      string    `json:"boot"` // the kernel's boot ID: after a restart of the machine no process is ours
	Cache     string    `json:"cache"`
	Complete  bool      `json:"complete"`
	Nodes     []node    `json:"nodes"`
	Processes []process `json:"processes"` // all but the nodes' inits, in the order of their start
	LoopsOld  []int     `json:"loopsOld"`  // loop devices that were in use before Up: not ours
	LoopsOurs []int     `json:"loopsOurs"` // found by Down, which may have to run twice
	FuseOurs  []uint64  `json:"fuseOurs"`  // FUSE connections, likewise
}

func statePath(dir string) string { return filepath.Join(dir, "state.json") }

// loadState returns nil without an error when dir holds no lab.
func loadState(dir string) (*state, error) {
	text, err := os.ReadFile(statePath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // no lab is an answer, not a fault
	}
	if err != nil {
		return nil, fmt.Errorf("read state of lab: %w", err)
	}
	var st state
	if err := json.Unmarshal(text, &st); err != nil {
		return nil, fmt.Errorf("read state of lab %s: %w", statePath(dir), err)
	}
	return &st, nil
}

// save replaces the state of the lab in dir, whole or not at all.
func (s *state) save(dir string) error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("write state of lab: %w", err)
	}
	return writeFile(statePath(dir), append(text, '\n'), 0o600)
}

// writeFile replaces path whole or not at all, and makes its folder.
func writeFile(path string, text []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, text, mode); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	return nil
}

func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot ID: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}
