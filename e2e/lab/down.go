package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// goneWait bounds how long killed processes and emptied cgroups may take to disappear.
const goneWait = 60 * time.Second

// Down removes the lab in dir by what is recorded there, complete or half made, no matter which program
// made it or how that ended: it kills every process, frees loop devices, removes links, cgroups and
// files, and then looks whether anything is left, which is an error that names it. The folder logs
// stays. Without a lab in dir it does nothing. A nil log means silence.
func Down(ctx context.Context, dir string, log *slog.Logger) error {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	dir = filepath.Clean(dir)
	st, err := loadState(dir)
	if err != nil || st == nil {
		return err
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	if boot == st.Boot {
		if err := st.end(ctx, dir); err != nil {
			return fmt.Errorf("end lab in %s: %w", dir, err)
		}
		log.Info("processes, devices, links and cgroups are gone")
	}
	if err := removeFiles(dir); err != nil {
		return err
	}
	log.Info("lab is removed", "dir", dir)
	return nil
}

// end removes everything that is not a file. It can be repeated after it failed half-way.
func (s *state) end(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, goneWait)
	defer cancel()
	if err := s.findDevices(dir); err != nil {
		return err
	}
	if err := s.save(dir); err != nil { // what is found now may be untraceable once the nodes are dead
		return err
	}
	if err := abortFuse(dir, s.FuseOurs); err != nil {
		return err
	}
	if err := s.killAll(ctx, dir); err != nil {
		return err
	}
	if err := s.findDevices(dir); err != nil { // made while we killed
		return err
	}
	if err := freeLoops(ctx, s.LoopsOurs); err != nil {
		return err
	}
	if err := removeLinks(ctx, s.Nodes); err != nil {
		return err
	}
	if err := until(ctx, "the lab's cgroups are removed", func(context.Context) (bool, error) {
		err := removeCgroups()
		return err == nil, err
	}); err != nil {
		return err
	}
	return s.leftovers(dir)
}

// killAll kills the nodes, the other processes, and whatever else carries the lab's mark, and waits
// until they are gone.
func (s *state) killAll(ctx context.Context, dir string) error {
	return until(ctx, "every process of the lab is gone", func(context.Context) (bool, error) {
		var living []string
		var errs []error
		found, err := marked(dir)
		errs = append(errs, err)
		for _, n := range s.Nodes {
			found = append(found, n.Init)
		}
		for _, p := range append(found, s.Processes...) {
			if p.alive() {
				living = append(living, fmt.Sprintf("%s (%d)", p.Name, p.PID))
				errs = append(errs, p.kill())
			}
		}
		inNodes, err := s.inNamespaces()
		errs = append(errs, err)
		living = append(living, inNodes...)
		if len(living) > 0 {
			errs = append(errs, fmt.Errorf("still there: %s", strings.Join(living, ", ")))
		}
		err = errors.Join(errs...)
		return err == nil, err
	})
}

// inNamespaces describes the processes in the network, mount or PID namespace of a node. Those of
// containers have others of their own; they live in PID namespaces below the node's, and the kernel
// does not let go of the node's init before every one of them is gone.
func (s *state) inNamespaces() ([]string, error) {
	ours := map[string]string{}
	for _, n := range s.Nodes {
		for _, ns := range []string{n.NetNS, n.MountNS, n.PIDNS} {
			if ns != "" {
				ours[ns] = n.Name
			}
		}
	}
	pids, err := allPIDs()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, pid := range pids {
		for _, kind := range []string{"net", "mnt", "pid"} {
			ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
			if err != nil {
				continue // it ended meanwhile
			}
			if node, ok := ours[ns]; ok {
				found = append(found, fmt.Sprintf("%s (%d, in %s of node %s)", processName(pid), pid, ns, node))
				break
			}
		}
	}
	return found, nil
}

// leftovers returns an error that names whatever of the lab still exists outside of its folder.
func (s *state) leftovers(dir string) error {
	var left []string
	found, err1 := marked(dir)
	for _, p := range found {
		left = append(left, fmt.Sprintf("process %s (%d)", p.Name, p.PID))
	}
	inNodes, err2 := s.inNamespaces()
	left = append(left, inNodes...)
	mounts, err3 := readMounts("self")
	for _, m := range mounts {
		if strings.HasPrefix(m.point, dir+"/") {
			left = append(left, "mount "+m.point)
		}
	}
	for _, name := range labLinks(s.Nodes) {
		if linkExists(name) {
			left = append(left, "link "+name)
		}
	}
	cgroups, err4 := labCgroups()
	for _, path := range cgroups {
		left = append(left, "cgroup "+path)
	}
	for _, n := range s.LoopsOurs {
		if file := backingFile(n); file != "" {
			left = append(left, fmt.Sprintf("loop device %d of %s", n, file))
		}
	}
	if len(left) > 0 {
		left = []string{"left over: " + strings.Join(left, ", ")}
		return errors.Join(errors.New(left[0]), err1, err2, err3, err4)
	}
	return errors.Join(err1, err2, err3, err4)
}

// removeFiles removes everything in dir but the logs; the state goes last, so that a Down that fails
// here can be repeated. The nodes' mounts are gone with their namespaces: had one reached the host, the
// check before would have found it, and RemoveAll must never follow one into the host's own files.
func removeFiles(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("remove lab: %w", err)
	}
	for _, e := range entries {
		if e.Name() == "logs" || e.Name() == filepath.Base(statePath(dir)) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("remove lab: %w", err)
		}
	}
	if err := os.Remove(statePath(dir)); err != nil && !errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("remove lab: %w", err)
	}
	return nil
}
