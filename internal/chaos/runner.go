package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	volumesN = 2

	bornWait  = 60 * time.Second // for the set-up
	serveWait = 60 * time.Second // how soon a healed cluster must serve
	readWait  = 30 * time.Second // for reading everything at the end

	// activityFloorPercent of the requests must succeed, or the run has shown nothing.
	activityFloorPercent = 30
)

// runner is one run from the set-up to the verdict.
type runner struct {
	opts    options
	lab     *lab
	history *history
	volumes []*volume
	nemesis *nemesis
	healed  time.Duration // until every volume served again after the faults
	out     io.Writer
	outMu   sync.Mutex
}

func (r *runner) say(format string, args ...any) {
	r.outMu.Lock()
	defer r.outMu.Unlock()
	fmt.Fprintf(r.out, format+"\n", args...)
}

func (r *runner) run(ctx context.Context) error {
	p := drawPlan(planConfig{
		Seed: r.opts.seed, Duration: r.opts.duration, Nodes: r.opts.nodes, Volumes: volumesN, Classes: r.opts.classes,
	})
	r.say("seed %d: %d nodes, %d volumes, %s of %v", r.opts.seed, r.opts.nodes, volumesN, r.opts.duration, p.Classes)
	if err := r.setUp(ctx); err != nil {
		return fmt.Errorf("set-up: %w", err)
	}
	r.say("set up in %s; faults begin", r.lab.dir)
	err := r.breakAndHeal(ctx, p)
	err = errors.Join(err, r.history.write(filepath.Join(r.lab.dir, "history.jsonl")))
	if ctx.Err() != nil {
		return err
	}
	return errors.Join(err, r.verdict())
}

func (r *runner) setUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bornWait)
	defer cancel()
	for _, step := range []func(context.Context) error{
		r.lab.openNetwork, r.lab.openDisks, r.lab.makeCerts, r.lab.bear,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	if err := r.lab.cut(ctx, nil, 0); err != nil { // fails now if the kernel cannot filter
		return err
	}
	for i := range volumesN {
		v := newVolume(r.lab, r.history, i)
		size := fmt.Sprintf("%dMi", volumeBytes>>20)
		err := until(ctx, v.name+" is created", func() (bool, error) {
			err := r.lab.ask(ctx, r.lab.nodes[0], attachWait, nil, "volume", "create", v.name, "--size", size,
				"--param", "replicas=3")
			return err == nil, err
		})
		if err != nil {
			return err
		}
		r.volumes = append(r.volumes, v)
	}
	r.nemesis = newNemesis(r.lab, r.volumes, r.history, r.say)
	return nil
}

// breakAndHeal runs clients and nemesis, heals, waits until all is served again and reads everything.
func (r *runner) breakAndHeal(ctx context.Context, p plan) error {
	keeping, endKeep := context.WithCancel(ctx)
	working, endWork := context.WithCancel(keeping)
	var keepers, workers sync.WaitGroup
	defer keepers.Wait()
	defer endKeep()
	defer workers.Wait()
	defer endWork()
	for _, v := range r.volumes {
		rng := r.rng(1, v.index)
		keepers.Go(func() { v.keep(keeping, rng) })
		for i := range clientsN {
			c := &client{id: v.index*clientsN + i, volume: v, rng: r.rng(2, v.index*clientsN+i)}
			workers.Go(func() { c.work(working) })
		}
	}
	err := r.nemesis.run(ctx, p, r.opts.duration)
	if pauseErr := pause(ctx, 0); pauseErr != nil {
		return errors.Join(err, r.heal(context.WithoutCancel(ctx)))
	}
	if err = errors.Join(err, r.heal(ctx)); err != nil {
		return err
	}
	r.awaitService(ctx)
	endWork()
	workers.Wait()
	return r.readEverything(ctx)
}

// rng returns a generator of its own for each part of the run, from the seed.
func (r *runner) rng(kind, index int) *rand.Rand {
	return rand.New(rand.NewPCG(r.opts.seed, uint64(kind)<<32|uint64(index))) //nolint:gosec // repeats with the seed
}

// heal ends whatever fault is left and starts every server that does not run.
func (r *runner) heal(ctx context.Context) error {
	errs := []error{r.lab.cut(ctx, nil, 0)}
	for _, n := range r.lab.nodes {
		errs = append(errs, n.thaw(ctx))
		if p := n.process(); p.running() {
			_ = p.signal(syscall.SIGCONT) // gone meanwhile: started below
		} else if !r.nemesis.isRetired(n) && n.mounted == n.index {
			errs = append(errs, r.lab.start(n))
		}
	}
	r.say("healed; every volume must serve within %s", serveWait)
	return errors.Join(errs...)
}

// awaitService waits until requests that were begun after the healing succeed in every volume.
func (r *runner) awaitService(ctx context.Context) {
	since, began := r.history.now(), time.Now()
	ctx, cancel := context.WithTimeout(ctx, serveWait)
	defer cancel()
	err := until(ctx, "every volume serves again", func() (bool, error) {
		for _, v := range r.volumes {
			for _, kind := range []opKind{opRead, opWrite, opFlush} {
				if !r.history.servedSince(v.index, kind, since) {
					return false, fmt.Errorf("%s: no %s has succeeded; last attach: %w", v.name, kind, v.failure())
				}
			}
		}
		return true, nil
	})
	r.healed = time.Since(began)
	if err != nil && !errors.Is(err, context.Canceled) {
		r.history.violation(err.Error())
	}
}

func (r *runner) readEverything(ctx context.Context) error {
	for _, v := range r.volumes {
		read, cancel := context.WithTimeout(ctx, readWait)
		c := &client{id: finalClient, volume: v, rng: r.rng(3, v.index)}
		err := c.readAll(read)
		cancel()
		if err != nil && ctx.Err() == nil {
			r.history.violation(fmt.Sprintf("%s: not every block could be read at the end: %v", v.name, err))
		}
	}
	return nil
}

// verdict checks the history and the logs, prints the report and returns an error unless all is well.
func (r *runner) verdict() error {
	r.say("checking %d operations on blocks", len(r.history.ops))
	wrong := slices.Concat(r.history.violations, check(r.history.ops, r.history.fences), r.readLogs())
	succeeded, all := r.history.activity()
	if all == 0 || succeeded*100 < all*activityFloorPercent {
		wrong = append(wrong, fmt.Sprintf("only %d of %d requests succeeded; a run below %d %% shows nothing", succeeded, all,
			activityFloorPercent))
	}
	r.report(succeeded, all)
	const shownMax = 20
	for i, w := range wrong {
		if i == shownMax {
			r.say("  and %d more", len(wrong)-i)
			break
		}
		r.say("  WRONG: %s", w)
	}
	if len(wrong) > 0 {
		r.say("verdict: FAILED, seed %d", r.opts.seed)
		return fmt.Errorf("seed %d: %d things are wrong, the first: %s", r.opts.seed, len(wrong), wrong[0])
	}
	r.say("verdict: all well, seed %d", r.opts.seed)
	return nil
}

func (r *runner) report(succeeded, all int) {
	var faults []string
	for _, s := range shapes {
		if n := r.nemesis.counts[s.class]; n > 0 {
			faults = append(faults, fmt.Sprintf("%s %d", s.class, n))
		}
	}
	r.say("seed:       %d", r.opts.seed)
	r.say("faults:     %s", strings.Join(faults, ", "))
	for _, kind := range slices.Sorted(maps.Keys(r.history.counts)) {
		c := r.history.counts[kind]
		r.say("requests:   %-5s %6d succeeded %4d failed or unknown", kind, c.ok, c.failed)
	}
	r.say("activity:   %d of %d requests succeeded (%d %%)", succeeded, all, succeeded*100/max(all, 1))
	for _, v := range r.volumes {
		r.say("%s:       %d attachments, %d tries failed, longest pause %s, %d requests refused after a fence", v.name,
			v.attachN, v.failedN, time.Duration(r.history.longest[v.index]).Round(time.Millisecond), v.lateN)
	}
	for _, n := range r.lab.nodes {
		if n.crashesN > 0 {
			r.say("%s:         ended by itself %d times", n.name, n.crashesN)
		}
	}
	r.say("healing:    served again after %s", r.healed.Round(time.Millisecond))
	for _, note := range r.nemesis.notes {
		r.say("note:       %s", note)
	}
}

// readLogs looks for the end of a server that is a defect whatever was broken around it, and notes the others.
func (r *runner) readLogs() []string {
	var wrong []string
	for _, n := range r.lab.nodes {
		text, err := os.ReadFile(n.logPath())
		if err != nil {
			wrong = append(wrong, err.Error())
		}
		for line := range bytes.Lines(text) {
			if bytes.Contains(line, []byte("msg=\"stopping: ")) {
				r.nemesis.notes = append(r.nemesis.notes, fmt.Sprintf("%s ended itself: %s", n.name, bytes.TrimSpace(line)))
			}
			for _, mark := range []string{"panic: ", "fatal error: ", "broken invariant"} {
				if bytes.Contains(line, []byte(mark)) {
					wrong = append(wrong, fmt.Sprintf("%s: %s", n.name, bytes.TrimSpace(line)))
				}
			}
		}
	}
	return wrong
}
