package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// comparison is the interleaved pairs of one job: each of two runs, one with the setting and one without.
type comparison struct {
	job           job
	length        *stretch
	with, without []float64 // rates, by pair
}

// runPairs measures whether a live parameter helps: on one writeBack volume, the same job with and without it, one
// after the other, in turn first, so that whatever drifts on the machine meets both alike.
func runPairs(ctx context.Context, o *options) (err error) {
	key, values, ok := strings.Cut(o.toggle, "=")
	with, without, both := strings.Cut(values, ",")
	if !ok || !both {
		return fmt.Errorf("-toggle %q: want KEY=WITH,WITHOUT", o.toggle)
	}
	binary, err := filepath.Abs(o.binary)
	if err != nil {
		return err
	}
	cl, err := startCluster(ctx, binary, filepath.Join(o.dir, "trivet"), strings.Fields(o.serverArgs))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cl.stop()) }()
	systems := cl.volume(ctx, modeBack, o.sizeMiB<<20, o.cacheMiB)
	s := systems[0]
	for _, x := range systems {
		if x.stop != nil {
			defer func() { err = errors.Join(err, x.stop()) }()
		}
	}
	if s.reason != "" {
		return fmt.Errorf("%s: %s", s.name, s.reason)
	}
	set := func(value string) error {
		_, err := cl.ask(ctx, "volume", "set", strings.ToLower(modeBack), key+"="+value)
		return err
	}
	found, err := o.comparePairs(ctx, s, set, with, without)
	if err != nil {
		return err
	}
	_, err = os.Stdout.WriteString(pairsMarkdown(o, found))
	return err
}

// comparePairs runs the pairs of all jobs that were chosen.
func (o *options) comparePairs(ctx context.Context, s *system, set func(string) error, with, without string) (
	[]*comparison, error,
) {
	names := strings.Split(o.only, ",")
	if o.only == "" {
		names = []string{"J1", "J4", "J5"} // what write-back and read-ahead have a part in
	}
	length := time.Duration(o.seconds * float64(time.Second))
	var found []*comparison
	for _, j := range jobs {
		if slices.Contains(names, j.id) {
			found = append(found, &comparison{job: j, length: newStretch(length)})
		}
	}
	bar := newProgress(os.Stderr, 1+2*o.pairs*len(found))
	bar.step("filling")
	if err := fill(ctx, &s.target, o.sizeMiB<<20); err != nil {
		return nil, err
	}
	for pair := range o.pairs {
		for _, c := range found {
			order := []string{with, without}
			if pair%2 == 1 {
				slices.Reverse(order)
			}
			for _, value := range order {
				if err := set(value); err != nil {
					return nil, err
				}
				bar.step(c.job.id + " " + value)
				r, err := c.length.untilLong(o.leastBytes(&c.job), 1, func(d time.Duration) (result, error) {
					return c.job.run(ctx, &s.target, o.sizeMiB<<20, d)
				})
				if err != nil {
					return nil, err
				}
				if value == with {
					c.with = append(c.with, r.bytesPerSec)
				} else {
					c.without = append(c.without, r.bytesPerSec)
				}
			}
		}
	}
	bar.end()
	return found, nil
}

// pairsMarkdown is the table for docs/benchmarks.md.
func pairsMarkdown(o *options, found []*comparison) string {
	var b strings.Builder
	fmt.Fprintf(&b, "`%s`, %d interleaved pairs of %.0f s on one writeBack volume of %d MiB over NBD; %s.\n\n"+
		"| Job | with / without, median of the pairs | least, most | better in | p of the sign test |\n"+
		"|---|---|---|---|---|\n",
		o.toggle, o.pairs, o.seconds, o.sizeMiB, machine())
	for _, c := range found {
		ratios := c.ratios()
		better, n := 0, 0
		for _, r := range ratios {
			if r != 1 {
				n++
			}
			if r > 1 {
				better++
			}
		}
		fmt.Fprintf(&b, "| %s, %s | %.3f | %.3f, %.3f | %d of %d | %.3f |\n", c.job.id, c.job.what, middle(ratios),
			slices.Min(ratios), slices.Max(ratios), better, n, signTest(better, n))
	}
	return b.String()
}

func (c *comparison) ratios() []float64 {
	out := make([]float64, len(c.with))
	for i := range out {
		out[i] = c.with[i] / c.without[i]
	}
	return out
}

// middle returns the median. REQUIRES: not empty.
func middle(x []float64) float64 {
	s := slices.Sorted(slices.Values(x))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// signTest returns the two-sided p-value of the sign test (Dixon and Mood, 1946): how likely it is that chance alone
// makes one side the better in at least as uneven a share of n pairs as k.
func signTest(k, n int) float64 {
	tail := 0.0
	for i := range min(k, n-k) + 1 {
		lg, _ := math.Lgamma(float64(n + 1))
		li, _ := math.Lgamma(float64(i + 1))
		lj, _ := math.Lgamma(float64(n - i + 1))
		tail += math.Exp(lg - li - lj - float64(n)*math.Ln2)
	}
	return min(2*tail, 1)
}
