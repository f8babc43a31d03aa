package main

import (
	"context"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// startCeph measures an RBD image of a Ceph cluster that runs already (Debian packages ceph-common and librbd1; fio
// comes with the engine). The pool is BENCH_CEPH_POOL, rbd by default; three copies are the pool's default.
// Daemons on this machine are counted in, for CPU and memory.
func startCeph(ctx context.Context, sizeBytes int64) *system {
	const name, image = "Ceph RBD", "trivet-bench"
	rbd, err := exec.LookPath("rbd")
	if err != nil {
		return absent(name, "rbd is not installed (packages ceph-common, ceph-osd, ceph-mon)")
	}
	if out, err := exec.CommandContext(ctx, "fio", "--enghelp=rbd").CombinedOutput(); err != nil ||
		strings.Contains(string(out), "not loadable") || strings.Contains(string(out), "not found") {
		return absent(name, "this fio has no rbd engine")
	}
	pool := os.Getenv("BENCH_CEPH_POOL")
	if pool == "" {
		pool = "rbd"
	}
	spec := pool + "/" + image
	size := strconv.FormatInt(sizeBytes>>20, 10)
	create := exec.CommandContext(ctx, rbd, "create", "--size", size, "--image-feature", "layering", spec)
	out, err := create.CombinedOutput()
	if err != nil {
		return absent(name, "no image in pool %s of a running cluster: %s", pool, firstLine(string(out)))
	}
	args := []string{"--ioengine=rbd", "--clientname=admin", "--pool=" + pool, "--rbdname=" + image}
	return &system{
		name:      name,
		target:    target{args: args, copies: 1},
		processes: append(named("ceph-osd"), named("ceph-mon")...),
		stop: func() error {
			return exec.CommandContext(context.WithoutCancel(ctx), rbd, "rm", "--no-progress", spec).Run()
		},
	}
}

// named returns the processes on this machine whose command is name.
func named(name string) []process {
	var found []process
	entries, _ := os.ReadDir("/proc") // none found is an answer
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		comm, err := os.ReadFile("/proc/" + e.Name() + "/comm")
		if err == nil && strings.TrimSpace(string(comm)) == name {
			found = append(found, process{name, pid})
		}
	}
	return found
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}
