// Package sim runs a whole volume, with the real state machine, Raft and engine on three or five nodes,
// under faults drawn from a seed, and checks every answer that its users get.
//
// Cluster is such machines in one process: each has a disk that loses what was not synced when the
// machine crashes, and a place in a transport.Memory. Run drives one: workers write, read and discard
// through a replication.Volume while a nemesis makes faults of the classes in swarm.go, each seed of
// another subset and at other rates. A machine that its disk or memory gives a reason stops itself, as
// its process would, and boots again; one that stops without a reason fails the run.
//
// The group's members change too (change.go): replicas are made on spare machines, added, promoted, removed,
// and replaced where a disk was lost for good, one change at a time, its steps among the other faults.
//
// Snapshots of the volume are made, read, compared and deleted meanwhile, and the volume is set back to one; blocks
// rot under running machines and are to be repaired by scrubs; logs are cleaned and blocks swept, among power cuts
// (frozen.go, flip.go).
//
// Answers are judged twice. The oracle knows for each block which writes were issued and which
// acknowledged, and so what a read may return. The History is judged by porcupine after the run, one
// register for each block. Beside the workers, probes ask single machines, so that a deposed leader
// which believes in its lease is found, and the holder of a fenced epoch goes on writing. A vote on the disk of
// a machine that boots must be for somebody who stood in that term (ballots.go). After the
// faults a drawn majority must serve within two minutes and agree; then all replicas must.
//
// Run belongs inside a testing/synctest bubble: an hour costs seconds, and timeouts mean what they say.
// What a bubble cannot do: it has one clock, so machines differ in the periods of their timers only, and
// a paused machine's timers run on; and its clock stands still while a goroutine waits for a mutex, so
// only flushes of Raft's log are slow (diskfault.go).
//
// A seed fixes the kinds, rates and times of faults and what each user asks for. Goroutines are
// scheduled as the runtime likes, and Raft draws its timeouts from a source of its own, so a failing seed
// fails again in most runs, not in all.
package sim
