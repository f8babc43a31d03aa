// Command bench compares Trivet with its peers on one machine, in one run: `make bench`.
//
// Six jobs of fio (job.go) run against each system (raw.go, trivet.go, ceph.go) in turn, for several rounds, so
// that whatever else the machine does hits all of them; the medians count. Absolute figures belong to the machine,
// ratios to the raw file, or to three raw files written in parallel, mean something elsewhere.
//
// What is measured besides speed is of the processes of a system: CPU, memory and the bytes that they have
// written for a byte of the client. The load generator's own share is not in it, nor are kernel threads.
//
// A run of writes ends with a sync that is part of its time, so a cache that still has to drain counts. And a run of J1
// and J4 writes at least three times what the write-back cache of a volume may have dirty, on all systems (long.go).
package main
