package stage

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/trivet-csi/trivet"
)

// How often a watched stage is looked at: often enough for some hundred samples in a window.
const (
	samplesWanted = 400
	sampleEvery   = time.Millisecond // at least
	WindowMax     = time.Minute      // WindowMax is the longest window that Watch takes.
)

// Summary is what a stage did in a window. Times are in seconds, so that it reads the same in every encoding.
type Summary struct {
	Stage string `json:"stage"`
	Node  string `json:"node"`

	Count         uint64  `json:"count"` // requests that left
	Bytes         uint64  `json:"bytes,omitempty"`
	ArrivalRate   float64 `json:"arrivalRate"` // per second
	DepartureRate float64 `json:"departureRate"`
	Mean          float64 `json:"mean"` // of the time in the stage
	StdDev        float64 `json:"standardDeviation"`
	P50           float64 `json:"p50"`
	P99           float64 `json:"p99"`
	Max           float64 `json:"max"`

	Samples     int64   `json:"samples"`           // behind the next two
	Concurrency float64 `json:"concurrency"`       // requests inside at a time, sampled
	Utilisation float64 `json:"utilisation"`       // share of the samples with any inside
	Little      float64 `json:"littleConcurrency"` // the same as Concurrency by Little's law, λW: the check on both
	// ServiceRate is what the stage would do if it were never idle: what left it, per second in which it was
	// in use. It is a lower bound, for more requests at a time may make it faster. 0 = not known.
	ServiceRate float64 `json:"serviceRate"`
}

// Window is what a node saw of a volume.
type Window struct {
	Node    string    `json:"node"`
	Seconds float64   `json:"seconds"`
	Stages  []Summary `json:"stages"` // in order, without those that were not used

	Cache  *CacheSummary  `json:"cache,omitempty"`  // of the attachment, if the volume has one here
	Device *DeviceSummary `json:"device,omitempty"` // of the kernel, if the volume has one here, at the end
}

// Watch observes a volume for d and returns what happened. ErrNotFound: this process does not serve it;
// ErrInvalid: d is not above zero and at most WindowMax; the error of ctx when it ends first.
func (r *Registry) Watch(ctx context.Context, id trivet.VolumeID, d time.Duration) (Window, error) {
	if d <= 0 || d > WindowMax {
		return Window{}, fmt.Errorf("watch %s for %v: want at most %v: %w", id, d, WindowMax, trivet.ErrInvalid)
	}
	v := r.volume(id)
	if v == nil {
		return Window{}, fmt.Errorf("watch %s: not in use here: %w", id, trivet.ErrNotFound)
	}
	w := newWatch(v)
	cached := v.watchCache()
	ticker := time.NewTicker(max(d/samplesWanted, sampleEvery))
	defer ticker.Stop()
	end := time.NewTimer(d)
	defer end.Stop()
	for {
		select {
		case <-ticker.C:
			w.sample()
		case <-end.C:
			out := w.end()
			out.Cache, out.Device = cached(), v.Device()
			return out, nil
		case <-ctx.Done():
			return Window{}, fmt.Errorf("watch %s: %w", id, context.Cause(ctx))
		}
	}
}

// watch is a window that is open.
type watch struct {
	began    time.Duration
	stages   []Stage
	meters   []*Meter
	before   []*Totals
	inside   []int64 // sums over the samples
	busy     []int64
	samplesN int64
}

func newWatch(v *Volume) *watch {
	w := &watch{began: Now()}
	w.stages, w.meters = v.Used()
	for _, m := range w.meters {
		w.before = append(w.before, m.Totals())
	}
	w.inside, w.busy = make([]int64, len(w.meters)), make([]int64, len(w.meters))
	return w
}

func (w *watch) sample() {
	w.samplesN++
	for i, m := range w.meters {
		if n := m.Inside(); n > 0 {
			w.inside[i] += n
			w.busy[i]++
		}
	}
}

func (w *watch) end() Window {
	out := Window{Seconds: (Now() - w.began).Seconds()}
	for i, m := range w.meters {
		t := m.Totals()
		t.Sub(w.before[i])
		s := summary(t, out.Seconds)
		s.Stage, s.Samples = w.stages[i].String(), w.samplesN
		if w.samplesN > 0 {
			s.Concurrency = float64(w.inside[i]) / float64(w.samplesN)
			s.Utilisation = float64(w.busy[i]) / float64(w.samplesN)
		}
		if s.Utilisation > 0 {
			s.ServiceRate = s.DepartureRate / s.Utilisation
		}
		out.Stages = append(out.Stages, s)
	}
	return out
}

func summary(t *Totals, seconds float64) Summary {
	s := Summary{
		Count: t.LeftN, Bytes: t.Bytes, Mean: t.Mean().Seconds(), StdDev: math.Sqrt(t.Variance()),
		P50: t.Quantile(0.5).Seconds(), P99: t.Quantile(0.99).Seconds(), Max: t.Quantile(1).Seconds(),
	}
	if seconds > 0 {
		s.ArrivalRate, s.DepartureRate = float64(t.ArrivedN)/seconds, float64(t.LeftN)/seconds
		s.Little = s.ArrivalRate * s.Mean
	}
	return s
}
