package main

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"time"
)

// measurement is all rounds of one job on one system.
type measurement struct {
	results []result
	used    [][]use // of each process, by round
}

// median returns the middle of what f says of each round; of two middles the lower.
func (m *measurement) median(f func(i int) float64) float64 {
	all := make([]float64, len(m.results))
	for i := range all {
		all[i] = f(i)
	}
	if len(all) == 0 {
		return math.NaN()
	}
	slices.Sort(all)
	return all[(len(all)-1)/2]
}

func (m *measurement) rate(j *job) float64 {
	return m.median(func(i int) float64 {
		if j.blockBytes >= 1<<20 {
			return m.results[i].bytesPerSec
		}
		return m.results[i].opsPerSec
	})
}

// anyShort reports whether a run was too short to count for more than a cache.
func (m *measurement) anyShort() bool {
	return slices.ContainsFunc(m.results, func(r result) bool { return r.short })
}

// anyShort reports whether any run of any job was too short.
func (r *report) anyShort() bool {
	for _, jobs := range r.by {
		for _, m := range jobs {
			if m.anyShort() {
				return true
			}
		}
	}
	return false
}

// cpuPerOp is the processes' CPU for one request of the client.
func (m *measurement) cpuPerOp() time.Duration {
	return time.Duration(m.median(func(i int) float64 {
		sum := time.Duration(0)
		for _, u := range m.used[i] {
			sum += u.cpu
		}
		return float64(sum) / float64(max(m.results[i].opsN, 1))
	}))
}

// report is a whole run.
type report struct {
	systems []*system
	by      map[string]map[string]*measurement // system, job
	when    time.Time
	machine string
	run     string // how long, how often

	stretches map[string]*stretch // by job and system: how long runs have to be
}

func (r *report) of(system, job string) *measurement {
	m := r.by[system][job]
	if m == nil {
		return &measurement{}
	}
	return m
}

// ratio returns a system's speed as a ratio to the yardstick of a job; NaN when one is missing.
func (r *report) ratio(system string, j *job) float64 {
	return r.of(system, j.id).rate(j) / r.of(j.base, j.id).rate(j)
}

// markdown returns the tables.
func (r *report) markdown(plot string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Written by `make bench` on %s: %s; %s.\nMedians; in brackets the ratio to %s for J1, J2 and J4, "+
		"else to %s.\nraw3x is one of three files that are written in parallel. "+
		"A run of writes ends with a sync that counts.\n\n",
		r.when.Format(time.DateOnly), r.machine, r.run, nameRaw3x, nameRaw)
	b.WriteString("| |")
	for _, j := range jobs {
		fmt.Fprintf(&b, " %s |", j.id)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(jobs)) + "\n| |")
	for _, j := range jobs {
		fmt.Fprintf(&b, " %s |", j.what)
	}
	b.WriteString("\n")
	for _, s := range r.measured() {
		fmt.Fprintf(&b, "| %s |", s.name)
		for _, j := range jobs {
			fmt.Fprintf(&b, " %s |", r.cell(s.name, &j))
		}
		b.WriteString("\n")
	}
	if r.anyShort() {
		b.WriteString("\n† A run wrote less than it had to, even when it was made longer: " +
			"a part of it the cache may have hidden.\n")
	}
	fmt.Fprintf(&b, "\n![ratios](%s)\n\n", plot)
	r.resources(&b)
	b.WriteString("\nBytes written are those of the run itself, as the kernel counts them; what a server writes later,\n" +
		"to compact its tables, is not among them, and pages of the page cache that are written again count once.\n")
	for _, s := range r.systems {
		if s.reason != "" {
			fmt.Fprintf(&b, "\nNot measured: %s (%s).\n", s.name, s.reason)
		}
	}
	return b.String()
}

func (r *report) measured() []*system {
	return slices.DeleteFunc(slices.Clone(r.systems), func(s *system) bool { return s.reason != "" })
}

// cell is a speed, its ratio and the latency of the middle request.
func (r *report) cell(system string, j *job) string {
	m := r.of(system, j.id)
	if len(m.results) == 0 {
		return unknown
	}
	speed := fmt.Sprintf("%.0f/s", m.rate(j))
	if j.blockBytes >= 1<<20 {
		speed = fmt.Sprintf("%.0f MB/s", m.rate(j)/1e6)
	}
	if m.anyShort() {
		speed += "†"
	}
	p50 := m.median(func(i int) float64 { return float64(m.results[i].p50) })
	return fmt.Sprintf("%s (%.2f), p50 %.2f ms", speed, r.ratio(system, j), p50/1e6)
}

// resources is what the processes of each system used.
func (r *report) resources(b *strings.Builder) {
	b.WriteString("| Process | CPU for a request of J1, J3 | memory after J1, J4, at most | " +
		"bytes written for a byte of J1, J4 |\n" +
		"|---|---|---|---|\n")
	for _, s := range r.measured() {
		for i, p := range s.processes {
			fmt.Fprintf(b, "| %s: %s | %s, %s | %s, %s | %s, %s |\n", s.name, p.name,
				r.cpu(s.name, "J1", i), r.cpu(s.name, "J3", i), r.memory(s.name, "J1", i), r.memory(s.name, "J4", i),
				r.amplification(s.name, "J1", i), r.amplification(s.name, "J4", i))
		}
		if len(s.processes) > 1 {
			fmt.Fprintf(b, "| %s: all | %s, %s | | |\n", s.name, r.cpuOfAll(s.name, "J1"), r.cpuOfAll(s.name, "J3"))
		}
	}
}

// unknown stands where a job was not run.
const unknown = "–"

func (r *report) cpuOfAll(system, job string) string {
	m := r.of(system, job)
	if len(m.results) == 0 {
		return unknown
	}
	return fmt.Sprintf("%.1f µs", float64(m.cpuPerOp())/1e3)
}

func (r *report) cpu(system, job string, process int) string {
	m := r.of(system, job)
	if len(m.results) == 0 {
		return unknown
	}
	return fmt.Sprintf("%.1f µs", m.median(func(i int) float64 {
		return float64(m.used[i][process].cpu) / float64(max(m.results[i].opsN, 1))
	})/1e3)
}

func (r *report) memory(system, job string, process int) string {
	m := r.of(system, job)
	if len(m.results) == 0 {
		return unknown
	}
	most := int64(0)
	for _, round := range m.used {
		most = max(most, round[process].rssB)
	}
	return fmt.Sprintf("%d MiB", most>>20)
}

func (r *report) amplification(system, job string, process int) string {
	m := r.of(system, job)
	if len(m.results) == 0 {
		return unknown
	}
	return fmt.Sprintf("%.2f", m.median(func(i int) float64 {
		return float64(m.used[i][process].writtenB) / float64(max(m.results[i].writtenB, 1))
	}))
}

// Between these lines the report lies in docs/benchmarks.md; the rest of the file is left alone.
const (
	markBegin = "<!-- bench: begin -->"
	markEnd   = "<!-- bench: end -->"
)

// insert returns text with the report between its marks; without marks, in a section at its end.
func insert(text, report string) (string, error) {
	block := markBegin + "\n\n" + strings.TrimSpace(report) + "\n\n" + markEnd
	begin, end := strings.Index(text, markBegin), strings.Index(text, markEnd)
	switch {
	case begin < 0 && end < 0:
		return strings.TrimRight(text, "\n") + "\n\n## Beside its peers\n\n" + block + "\n", nil
	case begin < 0 || end < begin || strings.Count(text, markBegin) > 1 || strings.Count(text, markEnd) > 1:
		return "", fmt.Errorf("want %q and then %q, once each or not at all", markBegin, markEnd)
	}
	return text[:begin] + block + text[end+len(markEnd):], nil
}

// writeReport puts the report into the file at path, and the plot beside it.
func writeReport(r *report, path, plotPath, plotName string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	text, err := insert(string(old), r.markdown(plotName))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := os.WriteFile(plotPath, []byte(r.plot()), 0o644); err != nil { //nolint:gosec // documentation
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644) //nolint:gosec // documentation
}
