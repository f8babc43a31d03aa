package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// refuseWait is how long a server may take to see that a data directory is not its own.
const refuseWait = 15 * time.Second

// rollPause is what a careful operator waits between two nodes of a rolling restart.
const rollPause = 3 * time.Second

// leadWait bounds a move of leadership, which a dead target holds up.
const leadWait = 5 * time.Second

// giveUpAfter is how long a node is hidden when its volumes are taken from it.
const giveUpAfter = time.Second

// nemesis breaks what a plan says and heals it again. What it cannot do is an error of the run; what the product
// must not do is a violation in the history.
type nemesis struct {
	lab     *lab
	volumes []*volume
	history *history
	say     func(format string, args ...any)

	mu      sync.Mutex
	counts  map[class]int
	notes   []string // what was slow or odd, but no violation
	retired map[*node]bool
}

func newNemesis(l *lab, volumes []*volume, h *history, say func(string, ...any)) *nemesis {
	return &nemesis{
		lab: l, volumes: volumes, history: h, say: say, counts: map[class]int{}, retired: map[*node]bool{},
	}
}

func (m *nemesis) note(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	m.mu.Lock()
	m.notes = append(m.notes, text)
	m.mu.Unlock()
	m.say("        %s", text)
}

// run carries the plan out, each track on its own, and returns once all faults are over. Faults that would begin
// after d are left out, but for a wipe.
func (m *nemesis) run(ctx context.Context, p plan, d time.Duration) error {
	start := time.Now()
	errs := make([]error, tracksN)
	var wg sync.WaitGroup
	for t := range tracksN {
		wg.Go(func() {
			errs[t] = m.runTrack(ctx, p.track(t), start, d)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// runTrack does one event after the other. One that took longer moves those behind it, so that the pauses between
// them stay.
func (m *nemesis) runTrack(ctx context.Context, events []event, start time.Time, d time.Duration) error {
	late := time.Duration(0)
	for _, e := range events {
		if pause(ctx, time.Until(start.Add(e.At+late))) != nil {
			return nil //nolint:nilerr // the run ends; what was broken is whole
		}
		at := time.Since(start)
		late = max(late, at-e.At)
		if at > d && e.Class != classWipe { // a wipe is the last of its track, and the only one
			return nil
		}
		m.resolve(ctx, &e)
		m.say("%6.1f s  %s", at.Seconds(), e)
		m.mu.Lock()
		m.counts[e.Class]++
		m.mu.Unlock()
		if err := m.do(ctx, e); err != nil {
			return fmt.Errorf("%s: %w", e, err)
		}
	}
	return nil
}

// resolve replaces a role by the node that has it now.
func (m *nemesis) resolve(ctx context.Context, e *event) {
	name := ""
	switch e.Aim {
	case aimDrawn:
		return
	case aimHolder:
		if a := m.volumes[e.Volume].holder(); a != nil {
			name = a.node.name
		}
	case aimLeader:
		v, err := m.lab.show(ctx, m.volumes[e.Volume].name)
		for _, r := range v.Replicas {
			if err == nil && r.Leader {
				name = r.Node
			}
		}
	}
	e.Aim = aimDrawn // said by name; without a holder or a leader the drawn node it is
	for _, n := range m.lab.nodes {
		if n.name == name {
			e.Nodes[0] = n.index
		}
	}
}

func (m *nemesis) do(ctx context.Context, e event) error {
	var n *node
	if len(e.Nodes) > 0 {
		n = m.lab.nodes[e.Nodes[0]]
	}
	heal := context.WithoutCancel(ctx) // whatever happens, what was broken is made whole
	if hides[e.Class] {
		n.hide(true)
		defer n.hide(false)
	}
	if e.Move {
		defer time.AfterFunc(giveUpAfter, func() { m.giveUp(n) }).Stop()
	}
	switch e.Class {
	case classKill:
		n.end(syscall.SIGKILL)
		_ = pause(ctx, e.For) // cut short when the run ends
		return m.lab.start(n)
	case classPause:
		return m.stop(ctx, n, e.For)
	case classPartition, classOneWay, classBridge, classLoss:
		err := m.lab.cut(ctx, linksCut(e, len(m.lab.nodes)), e.Percent)
		_ = pause(ctx, e.For)
		return errors.Join(err, m.lab.cut(heal, nil, 0))
	case classFreeze:
		err := n.freeze(ctx)
		_ = pause(ctx, e.For)
		return errors.Join(err, n.thaw(heal))
	case classFull:
		err := n.fill()
		_ = pause(ctx, e.For)
		return errors.Join(err, os.Remove(n.fillPath()))
	case classWipe:
		return m.wipe(ctx, n)
	case classSwap:
		return m.swap(heal, n, m.lab.nodes[e.Nodes[1]], e.Disk)
	case classLead:
		name := m.volumes[e.Volume].name
		if by := m.anyUp(); by != nil {
			// It may be refused: its target may be dead, cut off or wiped.
			_ = m.lab.ask(ctx, by, leadWait, nil, "volume", "move-leader", name, n.name)
		}
		return nil
	case classMove:
		if a := m.volumes[e.Volume].holder(); a != nil {
			a.leave()
		}
		return nil
	case classRoll:
		return m.roll(ctx)
	}
	return fmt.Errorf("class %q is not known", e.Class)
}

// giveUp moves every volume that n holds.
func (m *nemesis) giveUp(n *node) {
	for _, v := range m.volumes {
		if a := v.holder(); a != nil && a.node == n {
			a.leave()
		}
	}
}

func (m *nemesis) anyUp() *node {
	for _, n := range m.lab.nodes {
		if n.up() {
			return n
		}
	}
	return nil
}

func (m *nemesis) stop(ctx context.Context, n *node, d time.Duration) error {
	p := n.process()
	if !p.running() {
		return nil // it died of itself a moment ago
	}
	err := p.signal(syscall.SIGSTOP)
	_ = pause(ctx, d)
	if contErr := p.signal(syscall.SIGCONT); !errors.Is(contErr, os.ErrProcessDone) {
		err = errors.Join(err, contErr)
	}
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// roll stops and starts each server in turn.
func (m *nemesis) roll(ctx context.Context) error {
	for _, n := range m.lab.nodes {
		if m.isRetired(n) {
			continue
		}
		began := time.Now()
		if !n.end(syscall.SIGTERM) {
			m.note("slow: %s did not stop within %s of SIGTERM and was killed", n.name, stopWait)
		} else if took := time.Since(began); took > stopWait/2 {
			m.note("slow: %s took %s to stop on SIGTERM", n.name, took.Round(time.Second))
		}
		if err := m.lab.start(n); err != nil {
			return err
		}
		_ = pause(ctx, rollPause) // cut short when the run ends, and then every server still comes back
	}
	return nil
}

func (m *nemesis) isRetired(n *node) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.retired[n]
}

// wipe takes the data of a node away. Started again it must refuse, or come back as a new one whose replicas of
// before are not there: if it served or voted with an empty log it could undo what it had acknowledged (H10).
func (m *nemesis) wipe(ctx context.Context, n *node) error {
	n.end(syscall.SIGKILL)
	entries, err := os.ReadDir(n.store())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(n.store(), e.Name())); err != nil {
			return err
		}
	}
	p, err := m.lab.launch(n, n.disk())
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.proc = p
	n.mu.Unlock()
	select {
	case <-p.exited:
		m.note("wiped %s refused to start (%v)", n.name, p.err)
		m.mu.Lock()
		m.retired[n] = true
		m.mu.Unlock()
	case <-time.After(refuseWait):
		m.note("wiped %s runs as a new node", n.name)
	case <-ctx.Done():
	}
	m.lookAtWiped(ctx, n)
	return nil
}

// lookAtWiped checks that no replica of before is served by the wiped node.
func (m *nemesis) lookAtWiped(ctx context.Context, n *node) {
	for _, v := range m.volumes {
		view, err := m.lab.show(ctx, v.name)
		if err != nil {
			m.note("%s cannot be shown after the wipe: %v", v.name, err)
			continue
		}
		for _, r := range view.Replicas {
			if r.Node == n.name && r.Term > 0 {
				m.history.violation(fmt.Sprintf("%s: the replica of wiped %s runs in term %d (H10)", v.name, n.name, r.Term))
			}
			if r.Node == n.name {
				m.say("        replica of %s on %s: %s %s", v.name, n.name, r.State, r.Reason)
			}
		}
	}
}

// swap starts two servers with each other's data, or with the right data directory and each other's disk. Both
// must refuse (H11).
func (m *nemesis) swap(ctx context.Context, a, b *node, diskOnly bool) error {
	pair := []*node{a, b}
	for _, n := range pair {
		n.end(syscall.SIGTERM)
	}
	if !diskOnly {
		if err := m.mountEach(ctx, map[*node]int{a: b.index, b: a.index}); err != nil {
			return err
		}
	}
	disks := map[*node]string{a: b.disk(), b: a.disk()}
	for _, n := range pair {
		disk := n.disk()
		if diskOnly {
			disk = disks[n]
		}
		p, err := m.lab.launch(n, disk)
		if err != nil {
			return err
		}
		if exited := waitExit(p, refuseWait); !exited || p.err == nil {
			m.history.violation(fmt.Sprintf("%s did not refuse to run with the data of another node (H11): exited %t, %v",
				n.name, exited, p.err))
			p.end(syscall.SIGKILL, 0)
		}
	}
	if !diskOnly {
		if err := m.mountEach(ctx, map[*node]int{a: a.index, b: b.index}); err != nil {
			return err
		}
	}
	return errors.Join(m.lab.start(a), m.lab.start(b))
}

func (m *nemesis) mountEach(ctx context.Context, which map[*node]int) error {
	for n := range which {
		if err := m.lab.unmount(ctx, n); err != nil {
			return err
		}
	}
	for n, of := range which {
		if err := m.lab.mount(ctx, n, of); err != nil {
			return err
		}
	}
	return nil
}

// waitExit reports whether p ended within wait; then p.err may be read.
func waitExit(p *process, wait time.Duration) bool {
	select {
	case <-p.exited:
		return true
	case <-time.After(wait):
		return false
	}
}
