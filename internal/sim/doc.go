// Package sim runs a whole volume, with the real state machine, Raft and engine on three nodes, under
// faults drawn from a seed, and checks every answer that its users get.
//
// Cluster is three machines in one process: each has a disk that loses what was not synced when the
// machine crashes, and a place in a transport.Memory. Run drives one: workers write, read and discard
// through a replication.Volume while a nemesis crashes machines in the middle of disk operations, cuts
// and slows links, holds messages, moves leadership and takes the volume over. The oracle knows for
// each block which writes were issued and which acknowledged, and so what a read may return.
//
// Run belongs inside a testing/synctest bubble: an hour costs seconds, and timeouts mean what they say.
// A seed fixes the faults and when they come; goroutines are still scheduled as the runtime likes, so
// a failing seed fails again in most runs, not in all.
package sim
