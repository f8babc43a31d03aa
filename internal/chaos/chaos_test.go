package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func planOf(seed uint64, classes ...class) plan {
	return drawPlan(planConfig{Seed: seed, Duration: time.Minute, Nodes: 3, Volumes: 2, Classes: classes})
}

func TestPlanRepeats(t *testing.T) {
	first, second := planOf(7), planOf(7)
	require.Equal(t, first, second)
	require.NotEqual(t, planOf(7).Events, planOf(8).Events)
	drawn := map[class]bool{}
	for seed := range uint64(200) {
		p := planOf(seed)
		require.GreaterOrEqual(t, len(p.Classes), 3)
		for _, e := range p.Events {
			require.Contains(t, p.Classes, e.Class)
			drawn[e.Class] = true
		}
	}
	require.Len(t, drawn, len(shapes), "every class is drawn by some seed")
}

// TestPlanKeepsAMajority: machines fall ill one after the other, and never after one was wiped.
func TestPlanKeepsAMajority(t *testing.T) {
	for seed := range uint64(500) {
		p := planOf(seed)
		wiped := false
		for tr := range tracksN {
			free := time.Duration(0)
			for _, e := range p.track(tr) {
				require.GreaterOrEqual(t, e.At, free, "seed %d: %s begins before the one before it ended", seed, e)
				free = e.At + e.For
				if tr == trackMachine {
					require.False(t, wiped, "seed %d: %s after a wipe", seed, e)
					wiped = e.Class == classWipe
				}
			}
		}
	}
}

func TestPlanStaysInItsRanges(t *testing.T) {
	for seed := range uint64(200) {
		for _, e := range planOf(seed).Events {
			i := slices.IndexFunc(shapes, func(s shape) bool { return s.class == e.Class })
			s := shapes[i]
			require.Len(t, e.Nodes, s.nodesN)
			require.GreaterOrEqual(t, e.For, s.forMin)
			require.LessOrEqual(t, e.For, s.forMax)
			require.LessOrEqual(t, e.Percent, s.percentMax)
			if len(e.Nodes) == 2 {
				require.NotEqual(t, e.Nodes[0], e.Nodes[1])
			}
		}
	}
}

func TestParseClasses(t *testing.T) {
	got, err := parseClasses(" kill,pause, kill,")
	require.NoError(t, err)
	require.Equal(t, []class{classKill, classPause}, got)
	_, err = parseClasses("kil")
	require.ErrorContains(t, err, "kil")
	got, err = parseClasses("")
	require.NoError(t, err)
	require.Empty(t, got)
}

func TestLinksCut(t *testing.T) {
	for _, tc := range []struct {
		name  string
		event event
		n     int
		want  []link
	}{
		{"partition", event{Class: classPartition, Nodes: []int{1}}, 3, []link{{0, 1}, {1, 0}, {1, 2}, {2, 1}}},
		{"one way", event{Class: classOneWay, Nodes: []int{2, 0}}, 3, []link{{2, 0}}},
		{"bridge", event{Class: classBridge, Nodes: []int{1}}, 3, []link{{0, 2}, {2, 0}}},
		{"bridge of five", event{Class: classBridge, Nodes: []int{4}}, 5, []link{
			{0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 0}, {2, 1}, {3, 0}, {3, 1},
		}},
		{"loss", event{Class: classLoss, Percent: 3}, 3, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []link
			for l := range linksCut(tc.event, tc.n) {
				got = append(got, l)
			}
			require.ElementsMatch(t, tc.want, got)
		})
	}
}

func TestRulesetDropsWhatArrives(t *testing.T) {
	cut := map[link]bool{{2, 0}: true}
	require.Contains(t, ruleset(0, 3, cut, 0), "ip saddr 10.214.0.3 drop")
	require.NotContains(t, ruleset(2, 3, cut, 0), "drop", "the other direction is open")
	require.NotContains(t, ruleset(1, 3, cut, 0), "drop")
	require.Contains(t, ruleset(1, 3, nil, 17), "numgen random mod 100 < 17 drop")
	require.NotContains(t, ruleset(1, 3, nil, 0), "drop")
}

func TestStampTellsItsPlace(t *testing.T) {
	s := stamp{Volume: 1, LBA: 5, Attachment: 3, Sequence: 77}
	block := make([]byte, blockBytes)
	got, err := readStamp(block, 1, 5)
	require.NoError(t, err)
	require.Zero(t, got.Sequence, "never written")

	s.fill(block)
	got, err = readStamp(block, 1, 5)
	require.NoError(t, err)
	require.Equal(t, s, got)
	_, err = readStamp(block, 1, 6)
	require.ErrorContains(t, err, "in the place of")
	_, err = readStamp(block, 0, 5)
	require.ErrorContains(t, err, "in the place of")
	for off := range blockBytes {
		block[off] ^= 4
		_, err = readStamp(block, 1, 5)
		require.Error(t, err, "byte %d is wrong", off)
		block[off] ^= 4
	}
	other := make([]byte, blockBytes)
	stamp{Volume: 1, LBA: 5, Attachment: 3, Sequence: 78}.fill(other)
	copy(block[blockBytes/2:], other[blockBytes/2:])
	_, err = readStamp(block, 1, 5)
	require.ErrorContains(t, err, "torn")
}

// TestStampHalfZeroes: a block with one byte that is not zero was not trimmed.
func TestStampHalfZeroes(t *testing.T) {
	block := make([]byte, blockBytes)
	block[blockBytes-1] = 1
	_, err := readStamp(block, 0, 0)
	require.ErrorContains(t, err, "not a stamped block")
}

// script makes ops of one volume from lines of: client kind lba sequence attachment call return outcome.
func script(t *testing.T, text string) []op {
	t.Helper()
	var ops []op
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) == "" {
			continue
		}
		var (
			o       op
			outcome string
		)
		_, err := fmt.Sscan(line, &o.Client, &o.Kind, &o.LBA, &o.Sequence, &o.Attachment, &o.Call, &o.Return, &outcome)
		require.NoError(t, err, "%s", line)
		o.OK = outcome == "ok"
		ops = append(ops, o)
	}
	return ops
}

func TestCheck(t *testing.T) {
	for _, tc := range []struct {
		name   string
		ops    string
		fences map[fence]int64
		want   string // part of one complaint; empty = all is well
	}{
		{name: "reads see the last write", ops: `
			1 read  3 0 1  1  2 ok
			1 write 3 1 1  3  4 ok
			2 read  3 1 1  5  6 ok
			2 trim  3 0 1  7  8 ok
			1 read  3 0 1  9 10 ok`},
		{name: "stale read", want: "vol1: the history is not linearizable (lba 3)", ops: `
			1 write 3 1 1  1  2 ok
			1 write 3 2 1  3  4 ok
			2 read  3 1 1  5  6 ok`},
		{name: "lost write", want: "not linearizable", ops: `
			1 write 3 1 1  1  2 ok
			2 read  3 0 1  3  4 ok`},
		{name: "blocks are apart", ops: `
			1 write 3 1 1  1  2 ok
			2 read  4 0 1  3  4 ok`},
		{name: "concurrent write may be seen or not", ops: `
			1 write 3 1 1  1 10 ok
			2 read  3 1 1  2  3 ok
			2 read  3 1 1  4  5 ok`},
		{name: "a value comes and goes", want: "not linearizable", ops: `
			1 write 3 1 1  1 10 ok
			2 read  3 1 1  2  3 ok
			2 read  3 0 1  4  5 ok`},
		{name: "unknown outcome happens late", ops: `
			1 write 3 1 1  1  2 unknown
			2 read  3 0 1  3  4 ok
			2 read  3 1 1  5  6 ok`},
		{name: "unknown outcome never happens", ops: `
			1 write 3 1 1  1  2 unknown
			2 read  3 0 1  3  4 ok`},
		{name: "unknown outcome happens twice", want: "not linearizable", ops: `
			1 write 3 1 1  1  2 unknown
			2 read  3 1 1  3  4 ok
			2 write 3 2 1  5  6 ok
			2 read  3 1 1  7  8 ok`},
		{name: "failed read says nothing", ops: `
			1 write 3 1 1  1  2 ok
			2 read  3 0 1  3  4 failed`},
		{name: "read from the future", want: "was read before it was written", ops: `
			2 read  3 1 1  1  2 ok
			1 write 3 1 1  3  4 ok`},
		{name: "read of what nobody wrote", want: "was read before it was written", ops: `
			2 read  3 9 1  1  2 ok`},
		{
			name: "fenced write succeeds", want: "write of attachment 1 succeeded after it was fenced",
			fences: map[fence]int64{{0, 1}: 0, {0, 2}: 5}, ops: `
			1 write 3 1 1  6  7 ok`,
		},
		{
			name: "fenced read succeeds", want: "read of attachment 1 succeeded after it was fenced",
			fences: map[fence]int64{{0, 2}: 5}, ops: `
			1 read 3 0 1  6  7 ok`,
		},
		{
			name: "fenced write is there", want: "was written by a fenced attachment and is there",
			fences: map[fence]int64{{0, 2}: 5}, ops: `
			1 write 3 1 1  6  7 unknown
			2 read  3 1 2  8  9 ok`,
		},
		{name: "a write before the fence may return after it", fences: map[fence]int64{{0, 2}: 5}, ops: `
			1 write 3 1 1  4  7 ok
			2 read  3 1 2  8  9 ok`},
		{name: "fence of another volume", fences: map[fence]int64{{1, 2}: 5}, ops: `
			1 write 3 1 1  6  7 ok`},
		{name: "a fenced flush may succeed", fences: map[fence]int64{{0, 2}: 5}, ops: `
			1 flush -1 0 1  6  7 ok`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wrong := check(script(t, tc.ops), tc.fences)
			if tc.want == "" {
				require.Empty(t, wrong)
				return
			}
			require.Contains(t, strings.Join(wrong, "\n"), tc.want)
		})
	}
}

// TestCheckFlushed looks at the check beside porcupine alone.
func TestCheckFlushed(t *testing.T) {
	const (
		undone = `
			1 write 3 1 1  1  2 ok
			1 write 3 2 1  3  4 ok
			1 flush -1 0 1 5  6 ok
			2 read  3 1 1  7  8 ok`
		unflushed = `
			1 write 3 1 1  1  2 ok
			1 write 3 2 1  3  4 ok
			1 flush -1 0 1 5  6 unknown
			2 read  3 1 1  7  8 ok`
		early = `
			1 write 3 1 1  1  2 ok
			1 flush -1 0 1 3  6 ok
			1 write 3 2 1  3  4 ok
			2 read  3 1 1  7  8 ok`
		concurrent = `
			1 write 3 1 1  1  4 ok
			1 write 3 2 1  3  4 ok
			1 flush -1 0 1 5  6 ok
			2 read  3 1 1  7  8 ok`
		fenced = `
			1 write 3 1 1  1  2 unknown
			1 write 3 2 2  4  5 ok
			1 flush -1 0 2 6  7 ok
			2 read  3 1 2  8  9 ok`
	)
	for _, tc := range []struct {
		name   string
		ops    string
		fences map[fence]int64
		wrongN int
	}{
		{"a flushed write is undone", undone, nil, 1},
		{"the flush failed", unflushed, nil, 0},
		{"the flush began before the write was acknowledged", early, nil, 0},
		{"either of two concurrent writes may be the last", concurrent, nil, 0},
		{"an unknown write may come late", fenced, nil, 0},
		{"an unknown write cannot come after its fence", fenced, map[fence]int64{{0, 2}: 3}, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Len(t, checkFlushed(script(t, tc.ops), tc.fences), tc.wrongN)
		})
	}
}

// TestUnreadUnknownsAreLeftOut: the search is exponential in open operations.
func TestUnreadUnknownsAreLeftOut(t *testing.T) {
	ops := script(t, `
		1 write 3 1 1  1  2 unknown
		1 write 3 2 1  3  4 unknown
		1 write 4 2 1  3  4 unknown
		2 read  3 2 1  5  6 ok
		1 flush -1 0 1 5  6 ok`)
	got := operations(ops, 0)
	require.Len(t, got, 2)
	require.EqualValues(t, 2, inputOf(got[0]).Sequence)
	require.EqualValues(t, forever, got[0].Return, "open to the end")
	require.EqualValues(t, 6, got[1].Return)
}

func TestHistoryCounts(t *testing.T) {
	h := newHistory()
	h.add([]op{{Kind: opWrite, Call: 10, Return: 20, OK: true}, {Kind: opWrite, LBA: 1, Call: 10, Return: 20, OK: true}})
	h.add([]op{{Kind: opRead, Call: 20, Return: 90}})
	h.add([]op{{Kind: opWrite, Call: 30, Return: 100, OK: true, Late: true}})
	h.add([]op{{Kind: opRead, Call: 60, Return: 70, OK: true}})
	succeeded, all := h.activity()
	require.Equal(t, 2, succeeded, "a request of two blocks is one")
	require.Equal(t, 3, all, "late ones are no activity")
	require.EqualValues(t, 50, h.longest[0])
	require.True(t, h.servedSince(0, opRead, 59))
	require.False(t, h.servedSince(0, opRead, 60))
	require.False(t, h.servedSince(0, opWrite, 10))
}
