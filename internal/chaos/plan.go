package main

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// class is a kind of fault.
type class string

// The classes; docs/fault-injection.md says what each does and which hazard it looks for.
const (
	classKill      class = "kill"      // SIGKILL, and started again
	classPause     class = "pause"     // SIGSTOP for 0.2-10 s (H8, H12, H29)
	classPartition class = "partition" // one node apart from all others
	classOneWay    class = "oneway"    // one node hears another no more, but is heard
	classBridge    class = "bridge"    // two sides that both reach one node and not each other
	classLoss      class = "loss"      // 1-30 % of the packets of every node
	classFreeze    class = "freeze"    // fsfreeze of the data filesystem (H27)
	classFull      class = "full"      // the data filesystem has no byte left (H26)
	classWipe      class = "wipe"      // the data directory is emptied; once a run, near its end (H10)
	classSwap      class = "swap"      // two stopped nodes with each other's data (H11)
	classLead      class = "lead"      // leadership of a volume moves
	classMove      class = "move"      // the attachment of a volume moves by force (H12)
	classRoll      class = "roll"      // every node is stopped and started in turn
)

// track groups classes: faults of one track follow each other, those of different tracks overlap.
type track int

const (
	trackNet     track = iota // one fault of the network at a time
	trackMachine              // one machine at a time is down or ill, so that the volumes keep a majority
	trackOperator
	tracksN
)

// shape is what the draw needs to know of a class.
type shape struct {
	class      class
	track      track
	nodesN     int           // how many different nodes an event names
	forMin     time.Duration // how long the fault lasts
	forMax     time.Duration
	percentMax int // 0 = has no rate
}

// shapes holds every class in a fixed order, on which the meaning of a seed depends. The ranges are those of
// the swarm in the hazard list.
var shapes = []shape{
	{class: classKill, track: trackMachine, nodesN: 1, forMin: 200 * time.Millisecond, forMax: 5 * time.Second},
	{class: classPause, track: trackMachine, nodesN: 1, forMin: 200 * time.Millisecond, forMax: 10 * time.Second},
	{class: classPartition, track: trackNet, nodesN: 1, forMin: time.Second, forMax: 10 * time.Second},
	{class: classOneWay, track: trackNet, nodesN: 2, forMin: time.Second, forMax: 10 * time.Second},
	{class: classBridge, track: trackNet, nodesN: 1, forMin: time.Second, forMax: 10 * time.Second},
	{class: classLoss, track: trackNet, forMin: 2 * time.Second, forMax: 10 * time.Second, percentMax: 30},
	{class: classFreeze, track: trackMachine, nodesN: 1, forMin: time.Second, forMax: 9 * time.Second},
	{class: classFull, track: trackMachine, nodesN: 1, forMin: 2 * time.Second, forMax: 8 * time.Second},
	{class: classWipe, track: trackMachine, nodesN: 1},
	{class: classSwap, track: trackMachine, nodesN: 2},
	{class: classLead, track: trackOperator, nodesN: 1},
	{class: classMove, track: trackOperator, nodesN: 1},
	{class: classRoll, track: trackMachine},
}

// hides are the faults under which a holder lives on and cannot know that it was given up: when they end it
// is as dangerous as it can be (H8, H12).
var hides = map[class]bool{classPause: true, classPartition: true, classFreeze: true}

// moveForMin is how long such a fault lasts at least when the volume is to move meanwhile: an election, a fence
// and an attachment have to fit in.
const moveForMin = 9 * time.Second

// aim says which node a fault is for. A role is looked up when the fault begins.
type aim int

const (
	aimDrawn aim = iota
	aimLeader
	aimHolder
)

// event is one fault of a plan.
type event struct {
	At      time.Duration // since the start of the faults; later when the one before it took longer
	For     time.Duration
	Class   class
	Track   track
	Volume  int   // the volume that an operator moves, or whose leader or holder is meant
	Nodes   []int // different nodes, from 0; an aim replaces the first
	Aim     aim
	Percent int  // of packets lost
	Disk    bool // swap: only the disk is the other's, by a wrong --disk
	Move    bool // what is attached to the node moves away meanwhile, as when its machine is given up
}

func (e event) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s", e.Class)
	switch {
	case e.Aim == aimLeader:
		fmt.Fprintf(&b, " of the leader of vol%d", e.Volume+1)
	case e.Aim == aimHolder:
		fmt.Fprintf(&b, " of the holder of vol%d", e.Volume+1)
	case len(e.Nodes) > 0:
		fmt.Fprintf(&b, " of")
		for _, n := range e.Nodes {
			fmt.Fprintf(&b, " n%d", n+1)
		}
	}
	if e.Percent > 0 {
		fmt.Fprintf(&b, " %d %%", e.Percent)
	}
	if e.Move {
		b.WriteString(", given up,")
	}
	if e.For > 0 {
		fmt.Fprintf(&b, " for %d ms", e.For.Milliseconds())
	}
	return b.String()
}

// plan is everything about the faults of a run that its seed decides.
type plan struct {
	Classes []class
	Events  []event // by At
}

// track returns the events of one track, in order.
func (p plan) track(t track) []event {
	var events []event
	for _, e := range p.Events {
		if e.Track == t {
			events = append(events, e)
		}
	}
	return events
}

// planConfig says what a plan is for.
type planConfig struct {
	Seed     uint64
	Duration time.Duration // faults end here, but for the rest of one under way
	Nodes    int           // at least 3
	Volumes  int           // at least 1
	Classes  []class       // empty = a random subset of at least three, drawn from the seed
}

// drawPlan makes the plan of a seed: the same configuration gives the same plan. It never has two machines
// ill at once, but for a swap, and wipes at most one, after which no other machine falls ill: a replica that
// was lost is not rebuilt, so a majority would be gone for good.
func drawPlan(cfg planConfig) plan {
	rng := rand.New(rand.NewPCG(cfg.Seed, 0x6368616f73)) //nolint:gosec // a seed must give the same plan again
	p := plan{Classes: cfg.Classes}
	if len(p.Classes) == 0 {
		p.Classes = drawClasses(rng)
	}
	for t := range tracksN {
		p.Events = append(p.Events, drawTrack(rng, cfg, t, p.Classes)...)
	}
	slices.SortStableFunc(p.Events, func(a, b event) int { return cmp.Compare(a.At, b.At) })
	return p
}

// drawClasses takes each class with one chance in two (a swarm: runs that lack a fault reach states that
// runs with all of them never do), and enough of them that something happens.
func drawClasses(rng *rand.Rand) []class {
	const classesMin = 3
	for {
		var drawn []class
		for _, s := range shapes {
			if rng.IntN(2) == 0 {
				drawn = append(drawn, s.class)
			}
		}
		if len(drawn) >= classesMin {
			return drawn
		}
	}
}

func drawTrack(rng *rand.Rand, cfg planConfig, t track, classes []class) []event {
	var choice []shape
	wipe := false
	for _, s := range shapes {
		switch {
		case s.track != t || !slices.Contains(classes, s.class):
		case s.class == classWipe:
			wipe = true
		default:
			choice = append(choice, s)
		}
	}
	const settle = 2 * time.Second // the first seconds show that all is well
	end := cfg.Duration
	if wipe {
		end = cfg.Duration * 2 / 3
	}
	var events []event
	at := settle + between(rng, 0, 3*time.Second)
	for len(choice) > 0 && at < end {
		e := drawEvent(rng, cfg, choice[rng.IntN(len(choice))])
		e.At = at
		events = append(events, e)
		at += e.For + between(rng, time.Second, 4*time.Second)
	}
	if wipe {
		i := slices.IndexFunc(shapes, func(s shape) bool { return s.class == classWipe })
		e := drawEvent(rng, cfg, shapes[i])
		e.At = max(at, end)
		events = append(events, e)
	}
	return events
}

func drawEvent(rng *rand.Rand, cfg planConfig, s shape) event {
	e := event{
		Class: s.class, Track: s.track, For: between(rng, s.forMin, s.forMax), Volume: rng.IntN(cfg.Volumes),
		Nodes: rng.Perm(cfg.Nodes)[:s.nodesN], Disk: s.class == classSwap && rng.IntN(2) == 0,
	}
	if s.nodesN == 1 && s.track != trackOperator {
		e.Aim = aim(rng.IntN(int(aimHolder) + 1))
	}
	if hides[s.class] && e.Aim == aimHolder && rng.IntN(3) > 0 {
		e.Move, e.For = true, max(e.For, moveForMin)
	}
	if s.percentMax > 0 {
		e.Percent = 1 + rng.IntN(s.percentMax)
	}
	return e
}

func between(rng *rand.Rand, low, high time.Duration) time.Duration {
	if high <= low {
		return low
	}
	return low + time.Duration(rng.Int64N(int64(high-low)))
}

// parseClasses reads a list as "kill,pause"; empty text is no choice.
func parseClasses(text string) ([]class, error) {
	var classes []class
	for name := range strings.SplitSeq(text, ",") {
		c := class(strings.TrimSpace(name))
		if c == "" {
			continue
		}
		if !slices.ContainsFunc(shapes, func(s shape) bool { return s.class == c }) {
			var known []string
			for _, s := range shapes {
				known = append(known, string(s.class))
			}
			return nil, fmt.Errorf("class %q: want some of %s", c, strings.Join(known, ","))
		}
		if !slices.Contains(classes, c) {
			classes = append(classes, c)
		}
	}
	return classes, nil
}
