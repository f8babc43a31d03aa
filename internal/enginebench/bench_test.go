package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// TestMain makes the test binary the process that the phase crash kills.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == victimArg {
		if err := victim(os.Args[2:], os.Stdin, os.Stdout); err != nil {
			_, _ = io.WriteString(os.Stderr, err.Error()+"\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func small(dir string, more ...string) []string {
	return append([]string{
		"-dir", dir, "-mib", "8", "-segment", "1", "-overwrites", "2", "-rounds", "1", "-snapshots", "5", "-small", "16",
		"-large", "1024", "-spread", "64", "-entries", "200", "-open", "4096", "-backlog", "4", "-goroutines", "3",
	}, more...)
}

// TestSmoke runs all phases, small. What they measure on a busy machine means nothing; that they measure does.
func TestSmoke(t *testing.T) {
	dir := t.TempDir()
	o, err := parse(small(dir))
	require.NoError(t, err)
	var out, notes bytes.Buffer
	b, err := newBench(o, &out, &notes)
	require.NoError(t, err)
	require.NoError(t, b.run(), notes.String())
	for what, wanted := range map[string]string{
		"log + apply, 8 writers":            "",
		"log + apply, MB/s":                 "≥ 1.5",
		"write, one writer that waits":      "",
		"CPU a block":                       "≤ 9",
		"allocations a block":               "≤ 0",
		"for each byte, in order":           "≤ 1.15",
		"for each byte, random":             "≤ 2.2",
		"files but for the retained log":    "≤ 1.5",
		"from the disk for each byte":       "≤ 1.1",
		"random reads a second, median":     "≥ 0.7",
		"freeze, ms: 1 GiB to 0.015625 GiB": "≤ 2",
		"freeze, ms: 5 snapshots to 1":      "≤ 2",
		"clone, ms: 1 GiB to 0.015625 GiB":  "≤ 2",
		"clone, ms: 5 snapshots to 1":       "≤ 2",
		"a second, 5 snapshots to none":     "≥ 0.8",
		"log + apply of 16 blocks, p99.9":   "≤ 3",
		"all, s: 1 GiB, 4096 live blocks":   "≤ 5",
		"volume of 8 MiB, 2 overwrites in":  "",
	} {
		line := lineWith(t, out.String(), what)
		require.Contains(t, line, wanted)
		if wanted != "" && !strings.HasPrefix(what, "from the disk") && !strings.Contains(what, "p99.9") {
			require.Regexp(t, "(reached|MISSED)$", line) // the others depend on the filesystem, and on what got cleaned
		}
	}
	require.Contains(t, notes.String(), "MiB of the disk are needed")
	require.NoError(t, b.remove())
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

func lineWith(t *testing.T, text, what string) string {
	t.Helper()
	for line := range strings.Lines(text) {
		if strings.Contains(line, what) {
			return strings.TrimSpace(line)
		}
	}
	t.Fatalf("no line with %q in:\n%s", what, text)
	return ""
}

// TestRoomIsAskedFor shows that nothing is begun on a disk that is too small.
func TestRoomIsAskedFor(t *testing.T) {
	o, err := parse(small(t.TempDir(), "-mib", "1073741824", "-phases", "write"))
	require.NoError(t, err)
	var notes bytes.Buffer
	b, err := newBench(o, io.Discard, &notes)
	require.NoError(t, err)
	require.ErrorContains(t, b.run(), "smaller -mib")
	require.NoError(t, b.remove())
}

func TestOptions(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		bad  string
	}{
		"defaults":      {nil, ""},
		"phase":         {[]string{"-phases", "write,red"}, `"red"`},
		"entry":         {[]string{"-entry", "0"}, "-entry"},
		"large entry":   {[]string{"-entry", "1024"}, "-entry"},
		"tiny volume":   {[]string{"-mib", "0"}, "-mib"},
		"tiny volumes":  {[]string{"-mib", "1", "-entry", "33"}, "-mib"}, // of 32 blocks each
		"no rounds":     {[]string{"-rounds", "0"}, "-rounds"},
		"snapshots":     {[]string{"-snapshots", "1020"}, "-snapshots"},
		"spread":        {[]string{"-small", "1"}, "-spread"},
		"quiet flushes": {[]string{"-entries", "9000"}, "-entries"},
		"open":          {[]string{"-large", "1024", "-open", "1000000"}, "-open"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parse(c.args)
			if c.bad == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorIs(t, err, trivet.ErrInvalid)
			require.ErrorContains(t, err, c.bad)
		})
	}
}

func TestNeedBytes(t *testing.T) {
	o, err := parse([]string{"-mib", "4096"})
	require.NoError(t, err)
	write, crash := o.needBytes([]string{"write"}), o.needBytes([]string{"crash"})
	require.Less(t, crash, write)
	require.Equal(t, write, o.needBytes([]string{"crash", "write"}))
	require.GreaterOrEqual(t, write, int64(10<<30))
	require.LessOrEqual(t, write, int64(12<<30), "what the run that counts may take")
}

func TestQuantile(t *testing.T) {
	require.Zero(t, quantile[float64](nil, 0.5))
	xs := make([]time.Duration, 1000)
	for i := range xs {
		xs[i] = time.Duration(len(xs) - i) // 1000 to 1
	}
	require.Equal(t, time.Duration(1000), quantile(xs, 0.999)) // the largest of a thousand
	require.Equal(t, time.Duration(999), quantile(xs, 0.998))
	require.Equal(t, time.Duration(501), median(xs))
	require.Equal(t, time.Duration(1), quantile(xs, 0))
	require.Equal(t, time.Duration(1000), quantile(xs, 1))
	require.Equal(t, time.Duration(1000), xs[0], "the order is the caller's")
	// A round on a slow moment slows both, and the ratio not.
	require.InDelta(t, 2.0, medianRatio([]float64{2, 20, 9}, []float64{1, 10, 3}), 1e-9)
}

func TestInTurns(t *testing.T) {
	var order strings.Builder
	say := func(what string, x float64) func() (float64, error) {
		return func() (float64, error) {
			order.WriteString(what)
			return x, nil
		}
	}
	as, bs, err := inTurns(3, say("a", 1), say("b", 2))
	require.NoError(t, err)
	require.Equal(t, []float64{1, 1, 1}, as)
	require.Equal(t, []float64{2, 2, 2}, bs)
	require.Equal(t, "abbaab", order.String())
	oops := errors.New("oops")
	_, _, err = inTurns(3, say("a", 1), func() (float64, error) { return 0, oops })
	require.ErrorIs(t, err, oops)
}

func TestReadersReadAllOver(t *testing.T) {
	seen, errs := make(chan trivet.LBA, 100), errors.New("no such block")
	rate, err := newReaders(2).rate(100, 1000, func(p []byte, lba trivet.LBA) error {
		if len(p) != trivet.BlockSize || lba >= 1000 {
			return errs
		}
		seen <- lba
		return nil
	})
	require.NoError(t, err)
	require.Positive(t, rate)
	require.Len(t, seen, 100)
	_, err = newReaders(2).rate(100, 1000, func([]byte, trivet.LBA) error { return errs })
	require.ErrorIs(t, err, errs)
}

func TestPlaces(t *testing.T) {
	lbas := make([]trivet.LBA, 4)
	next := inOrder(6)
	next(lbas)
	next(lbas)
	require.Equal(t, []trivet.LBA{4, 5, 0, 1}, lbas)
	next = spread(1000, 4)
	next(lbas)
	require.Equal(t, []trivet.LBA{0, 250, 500, 750}, lbas)
	next(lbas)
	require.Equal(t, []trivet.LBA{0, 250, 500, 750}, lbas)
	seen := map[trivet.LBA]bool{}
	random, runs := atRandom(8, newRand(1)), inRuns(8, newRand(1))
	for range 100 {
		random(lbas)
		for _, lba := range lbas {
			seen[lba] = true
		}
		runs(lbas)
		require.LessOrEqual(t, lbas[0], trivet.LBA(4))
		require.Equal(t, lbas[0]+3, lbas[3])
	}
	require.Len(t, seen, 8)
	bufs := payloads(2, trivet.BlockSize, newRand(1))
	require.NotEqual(t, bufs[0], bufs[1])
	require.NotZero(t, binary.BigEndian.Uint64(bufs[1][trivet.BlockSize-8:]))
}

func TestReadBytes(t *testing.T) {
	n, err := parseReadBytes([]byte("rchar: 1\nread_bytes: 4096\nwrite_bytes: 7\n"))
	require.NoError(t, err)
	require.Equal(t, int64(4096), n)
	_, err = parseReadBytes([]byte("rchar: 1\n"))
	require.Error(t, err)
	_, err = readBytes()
	require.NoError(t, err)
	require.InDelta(t, 1.25, perByte(5, 4), 1e-9)
	require.True(t, math.IsNaN(perByte(0, 4)), "a filesystem that does not count is not a perfect one")
}

func TestSpaceRatio(t *testing.T) {
	u := engine.LogUsage{LiveBytes: 100, RetainedBytes: 50}
	require.InDelta(t, 1.5, spaceRatio(200, u), 1e-9)
	require.True(t, math.IsNaN(spaceRatio(200, engine.LogUsage{})))
}

func TestCostSince(t *testing.T) {
	c := cost{wall: 5, cpu: 7, mallocs: 9, blocks: 2}.since(cost{wall: 1, cpu: 2, mallocs: 3})
	require.Equal(t, cost{wall: 4, cpu: 5, mallocs: 6, blocks: 2}, c)
}

func TestMarks(t *testing.T) {
	for name, c := range map[string]struct {
		f    figure
		mark string
	}{
		"most":           {alone("", 0, 1.1, atMost(1.1)), "reached"},
		"more":           {alone("", 0, 1.11, atMost(1.1)), "MISSED"},
		"least":          {compared("", 0, 7, 10, atLeast(0.7)), "reached"},
		"less":           {compared("", 0, 6, 10, atLeast(0.7)), "MISSED"},
		"by its value":   {compared("", 0, 8, 1, valueAtMost(9)), "reached"},
		"none wanted":    {compared("", 0, 8, 1, valueAtMost(0)), "MISSED"},
		"nothing wanted": {compared("", 0, 8, 1, wanted{}), ""},
		"unknown":        {alone("", 0, math.NaN(), atMost(1)), "not measured"},
		"by nothing":     {compared("", 0, 1, 0, atMost(1)), "not measured"},
	} {
		require.Equal(t, c.mark, c.f.mark(), name)
	}
}

func TestPrintFigures(t *testing.T) {
	var out strings.Builder
	printFigures(&out, "things", "others", []figure{
		compared("speed, µs", 1, 3, 2, atMost(2)),
		alone("width", 0, math.NaN(), atLeast(1)),
	})
	require.Equal(t, []string{
		"", "things                                                     measured     others   ratio  wanted",
		"speed, µs                                                       3.0        2.0    1.50  ≤ 2      reached",
		"width                                                             -          -       -  ≥ 1      not measured", "",
	}, trimRight(out.String()))
}

func trimRight(s string) []string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return lines
}
