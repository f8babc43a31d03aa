package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// volumeView is what is read of `trivet volume show -o json`.
type volumeView struct {
	ID       string `json:"id"`
	Attached string `json:"attachedNode"`
	Replicas []struct {
		Node   string `json:"node"`
		State  string `json:"state"`
		Reason string `json:"reason"`
		Leader bool   `json:"leader"`
		Term   uint64 `json:"term"`
	} `json:"replicas"`
}

// cli makes the command line of a trivet command at the server of n, within its namespace.
func (l *lab) cli(n *node, wait time.Duration, args ...string) []string {
	args = append(args, "--server", n.address, "--certs", filepath.Join(l.dir, "client"), "-o", "json",
		"--timeout", wait.String())
	return n.inSpace(l.binary, args...)
}

// ask runs a trivet command at the server of n and decodes its answer into v, unless v is nil.
func (l *lab) ask(ctx context.Context, n *node, wait time.Duration, v any, args ...string) error {
	line := l.cli(n, wait, args...)
	out, err := run(ctx, "", line[0], line[1:]...)
	if err != nil || v == nil {
		return err
	}
	return json.Unmarshal(out, v)
}

func (l *lab) makeCerts(ctx context.Context) error {
	ca := filepath.Join(l.dir, "ca")
	commands := [][]string{
		{"cert", "ca", "--dir", ca},
		{"cert", "client", "chaos", "--ca", ca, "--dir", filepath.Join(l.dir, "client")},
	}
	for _, n := range l.nodes {
		commands = append(commands, []string{"cert", "node", n.name, "--ca", ca, "--dir", filepath.Join(n.home, "certs")})
	}
	for _, c := range commands {
		if _, err := run(ctx, "", l.binary, c...); err != nil {
			return err
		}
	}
	return nil
}

// bear starts the servers, makes them a cluster and waits until every node is up in it.
func (l *lab) bear(ctx context.Context) error {
	for _, n := range l.nodes {
		if err := os.MkdirAll(filepath.Join(n.home, "run"), 0o700); err != nil {
			return err
		}
		if err := l.start(n); err != nil {
			return err
		}
	}
	err := until(ctx, "the first server accepts cluster init", func() (bool, error) {
		err := l.ask(ctx, l.nodes[0], 5*time.Second, nil, "cluster", "init")
		return err == nil, err
	})
	if err != nil {
		return err
	}
	return until(ctx, "every node is a member", func() (bool, error) {
		var status struct {
			Nodes []struct{ State, Role string }
		}
		if err := l.ask(ctx, l.nodes[0], 5*time.Second, &status, "cluster", "status"); err != nil {
			return false, err
		}
		up, voters := 0, 0
		for _, n := range status.Nodes {
			if n.State != "Up" {
				continue
			}
			up++
			if n.Role == "Leader" || n.Role == "Voter" {
				voters++
			}
		}
		const votersN = 3 // of the catalogue; further nodes are learners
		return up == len(l.nodes) && voters >= votersN,
			fmt.Errorf("%d of %d nodes are up: %+v", up, len(l.nodes), status.Nodes)
	})
}

// show asks any server that runs about a volume.
func (l *lab) show(ctx context.Context, name string) (volumeView, error) {
	errs := []error{errors.New("no server answers")}
	for _, n := range l.nodes {
		if !n.up() {
			continue
		}
		var v volumeView
		err := l.ask(ctx, n, 3*time.Second, &v, "volume", "show", name)
		if err == nil {
			return v, nil
		}
		errs = append(errs, err)
	}
	return volumeView{}, errors.Join(errs...)
}

// until polls ask until it reports true; the error of the last try explains a time-out.
func until(ctx context.Context, what string, ask func() (bool, error)) error {
	var last error
	for {
		done, err := ask()
		if done {
			return nil
		}
		if err != nil && ctx.Err() == nil {
			last = err
		}
		if pause(ctx, 200*time.Millisecond) != nil {
			return errors.Join(fmt.Errorf("waiting until %s: %w", what, context.Cause(ctx)), last)
		}
	}
}

// pause waits for d, or returns why ctx ended.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
