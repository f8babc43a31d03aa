package main

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const fioReport = `fio: a warning
{"jobs":[{"error":0,
 "read":{"io_bytes":0,"bw_bytes":0,"iops":0,"total_ios":0,"clat_ns":{}},
 "write":{"io_bytes":40960,"bw_bytes":4096,"iops":1.5,"total_ios":10,"clat_ns":{"percentile":{"50.000000":2000}}},
 "sync":{"total_ios":%SYNCS%,"lat_ns":{"percentile":{"50.000000":500}}}}]}`

func TestParse(t *testing.T) {
	t.Parallel()
	for syncs, want := range map[string]time.Duration{"10": 2500, "1": 2000} { // the one at the end is of no request
		r, err := parse([]byte(strings.Replace(fioReport, "%SYNCS%", syncs, 1)))
		require.NoError(t, err)
		require.Equal(t, result{opsPerSec: 1.5, bytesPerSec: 4096, writtenB: 40960, opsN: 10, p50: want}, r)
	}
	for _, bad := range []string{``, `{}`, `{"jobs":[{"error":5}]}`, `{"jobs":[{"error":0}]}`, `{"jobs":[{},{}]}`} {
		_, err := parse([]byte(bad))
		require.Error(t, err, bad)
	}
}

func TestReadUse(t *testing.T) {
	t.Parallel()
	before, err := readUse(os.Getpid())
	require.NoError(t, err)
	require.Positive(t, before.rssB)
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	require.NoError(t, err)
	const n = 8 << 20
	for range n >> 20 {
		_, err = f.Write(make([]byte, 1<<20))
		require.NoError(t, err)
	}
	require.NoError(t, errors.Join(f.Sync(), f.Close()))
	after, err := readUse(os.Getpid())
	require.NoError(t, err)
	used := after.minus(before)
	require.GreaterOrEqual(t, used.cpu, time.Duration(0))
	if used.writtenB == 0 {
		t.Skip("the temporary folder is in memory")
	}
	require.GreaterOrEqual(t, used.writtenB, int64(n))
}

// exampleReport has three rounds of J1 on two systems; the yardstick does 100 requests a second.
func exampleReport() *report {
	m := func(rates ...float64) map[string]*measurement {
		m := &measurement{}
		for _, rate := range rates {
			m.results = append(m.results, result{opsPerSec: rate, opsN: 10, writtenB: 1000, p50: time.Millisecond})
			m.used = append(m.used, []use{
				{cpu: 20 * time.Microsecond, writtenB: 1500, rssB: 3 << 20}, {cpu: 10 * time.Microsecond, rssB: 4 << 20},
			})
		}
		return map[string]*measurement{"J1": m}
	}
	return &report{
		systems: []*system{
			{name: nameRaw3x}, {name: "a & b", processes: []process{{"p1", 1}, {"p2", 2}}}, absent("other", "it is not here"),
		},
		by:   map[string]map[string]*measurement{nameRaw3x: m(1, 100, 1000), "a & b": m(50, 10, 90)},
		when: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), machine: "a machine", run: "three rounds",
	}
}

func TestReport(t *testing.T) {
	t.Parallel()
	r := exampleReport()
	require.InDelta(t, 0.5, r.ratio("a & b", &jobs[0]), 1e-9, "of medians")
	require.True(t, math.IsNaN(r.ratio("a & b", &jobs[1])))
	text := r.markdown("x.svg")
	for _, want := range []string{
		"| a & b | 50/s (0.50), p50 1.00 ms | – |", "| a & b: p1 | 2.0 µs, – | 3 MiB, – | 1.50, – |",
		"| a & b: all | 3.0 µs, – |", "Not measured: other (it is not here).", "2026-01-02", "![ratios](x.svg)",
	} {
		require.Contains(t, text, want)
	}
	require.NotContains(t, text, "| other |")
}

func TestPlotIsXML(t *testing.T) {
	t.Parallel()
	plot := exampleReport().plot()
	require.Contains(t, plot, ">0.50</text>")
	d := xml.NewDecoder(strings.NewReader(plot))
	for {
		_, err := d.Token()
		if errors.Is(err, io.EOF) {
			return
		}
		require.NoError(t, err)
	}
}

func TestInsert(t *testing.T) {
	t.Parallel()
	first, err := insert("# Title\n\ntext\n", "one")
	require.NoError(t, err)
	require.Equal(t, "# Title\n\ntext\n\n## Beside its peers\n\n"+markBegin+"\n\none\n\n"+markEnd+"\n", first)
	second, err := insert(first+"\nmore\n", "two")
	require.NoError(t, err)
	require.Equal(t, strings.Replace(first, "one", "two", 1)+"\nmore\n", second)
	for _, bad := range []string{markBegin, markEnd, markEnd + markBegin, first + first} {
		_, err := insert(bad, "x")
		require.Error(t, err, bad)
	}
}

func TestChildEndsAtOnce(t *testing.T) {
	t.Parallel()
	s := startServer(t.Context(), "nobody", t.TempDir(), 4096, func(string, string) []string { return []string{"false"} })
	require.Contains(t, s.reason, "ended at once")
	s = startServer(t.Context(), "nobody", t.TempDir(), 4096, func(string, string) []string { return []string{"no-such"} })
	require.Contains(t, s.reason, "not installed")
}

// Without fio nothing is begun: a run would fill volumes for minutes, and then fail.
func TestNoFio(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	o := options{dir: t.TempDir(), busy: true, sizeMiB: 64}
	require.ErrorContains(t, run(t.Context(), &o), "fio, which measures, is to be installed")
	left, err := os.ReadDir(o.dir)
	require.NoError(t, err)
	require.Empty(t, left)
}
