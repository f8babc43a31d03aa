package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// job is one kind of load.
type job struct {
	id, what   string
	rw         string // of fio
	blockBytes int
	depth      int
	args       []string
	base       string // the system that its goal is a ratio to
	long       bool   // a run has to write more than a cache can hide, see leastBytes
}

// jobs are J1 to J6. The goals that go with them are in docs/benchmarks.md.
var jobs = []job{
	{"J1", "4 KiB random writes, 32 outstanding", "randwrite", 4 << 10, 32, []string{"--end_fsync=1"}, nameRaw3x, true},
	{"J2", "4 KiB write and fsync, one at a time", "randwrite", 4 << 10, 1, []string{"--fsync=1"}, nameRaw3x, false},
	{"J3", "4 KiB random reads, 32 outstanding", "randread", 4 << 10, 32, nil, nameRaw, false},
	{"J4", "1 MiB writes in order, 8 outstanding", "write", 1 << 20, 8, []string{"--end_fsync=1"}, nameRaw3x, true},
	{"J5", "1 MiB reads in order, 8 outstanding", "read", 1 << 20, 8, nil, nameRaw, false},
	{
		"J6", "4 KiB random, 70 % reads, 16 outstanding", "randrw", 4 << 10, 16,
		[]string{"--rwmixread=70", "--end_fsync=1"},
		nameRaw, false,
	},
}

// target is where fio finds a system: engine and place, as arguments of fio.
type target struct {
	args   []string
	copies int // files that are written in parallel; results are for one of them
}

// result is what one run of a job gave, for one copy.
type result struct {
	opsPerSec   float64
	bytesPerSec float64
	writtenB    int64 // bytes that the client wrote in the run
	opsN        int64
	p50         time.Duration // of a request, and of the sync that follows each in J2
	short       bool          // it wrote less than it had to
}

// run runs fio for a time on the first sizeBytes of the target.
func (j *job) run(ctx context.Context, t *target, sizeBytes int64, length time.Duration) (result, error) {
	args := []string{
		"--name=" + j.id, "--rw=" + j.rw, "--bs=" + strconv.Itoa(j.blockBytes), "--iodepth=" + strconv.Itoa(j.depth),
		"--size=" + strconv.FormatInt(sizeBytes, 10), "--time_based",
		"--runtime=" + strconv.FormatInt(int64(math.Ceil(length.Seconds())), 10),
		"--randrepeat=0", "--norandommap", "--numjobs=" + strconv.Itoa(t.copies), "--group_reporting",
		"--output-format=json", "--refill_buffers", "--fdatasync=0",
	}
	out, err := fio(ctx, append(append(args, j.args...), t.args...))
	if err != nil {
		return result{}, err
	}
	r, err := parse(out)
	if err != nil {
		return result{}, err
	}
	r.opsPerSec /= float64(t.copies)
	r.bytesPerSec /= float64(t.copies)
	return r, nil
}

// fill writes the whole target once, so that no job meets blocks that were never written.
func fill(ctx context.Context, t *target, sizeBytes int64) error {
	args := []string{
		"--name=fill", "--rw=write", "--bs=1M", "--iodepth=8", "--size=" + strconv.FormatInt(sizeBytes, 10),
		"--numjobs=" + strconv.Itoa(t.copies), "--end_fsync=1", "--refill_buffers", "--output-format=json",
	}
	_, err := fio(ctx, append(args, t.args...))
	return err
}

func fio(ctx context.Context, args []string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "fio", args...)
	b, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return nil, fmt.Errorf("fio %s: %w: %s", strings.Join(args, " "), err, exit.Stderr)
		}
		return nil, fmt.Errorf("fio: %w", err)
	}
	return b, nil
}

// parse reads fio's report. The time of a run includes the sync at its end (fio's update_runtime).
func parse(b []byte) (result, error) {
	type latency struct {
		Percentile map[string]int64 `json:"percentile"` // ns
	}
	type side struct {
		IOPS    float64 `json:"iops"`
		BW      float64 `json:"bw_bytes"`
		Bytes   int64   `json:"io_bytes"`
		Total   int64   `json:"total_ios"`
		Latency latency `json:"clat_ns"`
	}
	var report struct {
		Jobs []struct {
			Error int  `json:"error"`
			Read  side `json:"read"`
			Write side `json:"write"`
			Sync  struct {
				Total   int64   `json:"total_ios"`
				Latency latency `json:"lat_ns"`
			} `json:"sync"`
		} `json:"jobs"`
	}
	if i := strings.IndexByte(string(b), '{'); i > 0 { // fio prints warnings before the report
		b = b[i:]
	}
	if err := json.Unmarshal(b, &report); err != nil {
		return result{}, fmt.Errorf("fio's report: %w", err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return result{}, fmt.Errorf("fio's report has %d jobs, or an error: %+v", len(report.Jobs), report.Jobs)
	}
	j := report.Jobs[0]
	r := result{
		opsPerSec: j.Read.IOPS + j.Write.IOPS, bytesPerSec: j.Read.BW + j.Write.BW,
		writtenB: j.Write.Bytes, opsN: j.Read.Total + j.Write.Total,
	}
	if r.opsPerSec == 0 {
		return result{}, errors.New("fio's report: nothing was done")
	}
	of := j.Read // of a mixture, the reads: the writes of J6 have J1 for company
	if j.Read.Total == 0 {
		of = j.Write
	}
	r.p50 = time.Duration(of.Latency.Percentile["50.000000"])
	if j.Sync.Total*2 > of.Total { // a sync after each request is part of it
		r.p50 += time.Duration(j.Sync.Latency.Percentile["50.000000"])
	}
	return r, nil
}
