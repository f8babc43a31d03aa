package meta

import (
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
)

const (
	// scrubFindingsMax is how many findings of a pass are kept: the first ones.
	scrubFindingsMax = 32
	findingBytesMax  = 256
)

// Scrub is how far the reading and comparing of a volume's replicas has got. A pass goes from the first block to the
// last; there is one at a time.
type Scrub struct {
	Pass      uint64    `json:"pass"`                // number of the pass, from 1
	Running   bool      `json:"running,omitempty"`   // it is under way: the volume's group stays awake
	Verify    bool      `json:"verify,omitempty"`    // it compares, and repairs nothing
	RateBytes int64     `json:"rateBytes,omitempty"` // bytes per second that each replica reads; 0 = no limit
	Started   time.Time `json:"started"`
	Ended     time.Time `json:"ended"` // zero while it runs, and when it was given up
	// Next is the block at which a pass that runs goes on, whoever leads then.
	Next trivet.LBA `json:"next,omitempty"`

	CheckedBytes int64 `json:"checkedBytes,omitempty"` // read by all replicas together
	Found        int64 `json:"found,omitempty"`        // blocks that are damaged, or are not what the majority has
	Repaired     int64 `json:"repaired,omitempty"`     // of them
	Left         int64 `json:"left,omitempty"`         // of them, those that nobody could repair
	// Findings say what was found, the first of it.
	Findings []string `json:"findings,omitempty"`
	// Absent are nodes that took no part in some of it.
	Absent []trivet.NodeID `json:"absent,omitempty"`

	// LastStarted and LastEnded are of the last scrub, not verify, that has come to its end.
	LastStarted time.Time `json:"lastStarted"`
	LastEnded   time.Time `json:"lastEnded"`
}

func (s *Scrub) clone() *Scrub {
	if s == nil {
		return nil
	}
	c := *s
	c.Findings, c.Absent = slices.Clone(s.Findings), slices.Clone(s.Absent)
	return &c
}

// instants brings the times of s to the form of instant.
func (s *Scrub) instants() {
	for _, t := range []*time.Time{&s.Started, &s.Ended, &s.LastStarted, &s.LastEnded} {
		*t = instant(*t)
	}
}

// Scrubbing reports whether a pass over the volume is under way.
func (v *Volume) Scrubbing() bool { return v.Scrub != nil && v.Scrub.Running }

// StartScrub begins a pass over a volume, or, while one of the same kind is under way, sets its rate. A verify takes
// the place of a scrub that is under way, which is given up and due again; ErrPending when it is the other way round,
// or Pass is not the next; ErrInvalid unless the volume is Available, Bound or Released. It does not raise the volume's
// revision, and neither does ReportScrub: nothing that is decided on a volume depends on them.
type StartScrub struct {
	Volume    trivet.VolumeID `json:"volume"`
	Pass      uint64          `json:"pass"` // one above the pass that the proposer saw, or that one if it is running
	Verify    bool            `json:"verify,omitempty"`
	RateBytes int64           `json:"rateBytes,omitempty"`
	Time      time.Time       `json:"time"`
}

// ReportScrub says what the scrub of a range found. Another pass than the one that runs, or another From than its
// Next: no effect, so a range counts once.
type ReportScrub struct {
	Volume trivet.VolumeID `json:"volume"`
	Pass   uint64          `json:"pass"`
	From   trivet.LBA      `json:"from"`
	Next   trivet.LBA      `json:"next"` // above From, unless Done
	Done   bool            `json:"done,omitempty"`
	Time   time.Time       `json:"time"`

	CheckedBytes int64           `json:"checkedBytes,omitempty"`
	Found        int64           `json:"found,omitempty"`
	Repaired     int64           `json:"repaired,omitempty"`
	Left         int64           `json:"left,omitempty"`
	Findings     []string        `json:"findings,omitempty"`
	Absent       []trivet.NodeID `json:"absent,omitempty"`
}

func (s *StartScrub) op() string {
	if s.Verify {
		return fmt.Sprintf("verify %s", s.Volume)
	}
	return fmt.Sprintf("scrub %s", s.Volume)
}

func (s *StartScrub) validate() error {
	switch {
	case s.Pass == 0:
		return fmt.Errorf("pass is not set: %w", trivet.ErrInvalid)
	case s.RateBytes < 0:
		return fmt.Errorf("rate of %d bytes per second: %w", s.RateBytes, trivet.ErrInvalid)
	}
	return validateVolume(s.Volume)
}

func (s *StartScrub) apply(d *draft) error {
	v, err := d.edit(s.Volume)
	if err != nil {
		return err
	}
	switch v.Phase {
	case PhaseAvailable, PhaseBound, PhaseReleased:
	default:
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrInvalid)
	}
	now := v.Scrub.clone()
	if now == nil {
		now = &Scrub{}
	}
	switch {
	case now.Running && now.Pass == s.Pass && now.Verify == s.Verify:
		if now.RateBytes == s.RateBytes {
			return nil
		}
		now.RateBytes = s.RateBytes
	case now.Running && now.Verify:
		return fmt.Errorf("pass %d is under way, which only compares: %w", now.Pass, trivet.ErrPending)
	case now.Pass+1 != s.Pass, now.Running && !s.Verify:
		return fmt.Errorf("pass %d is not the next, %d is the last: %w", s.Pass, now.Pass, trivet.ErrPending)
	default:
		*now = Scrub{
			Pass: s.Pass, Running: true, Verify: s.Verify, RateBytes: s.RateBytes, Started: instant(s.Time),
			LastStarted: now.LastStarted, LastEnded: now.LastEnded,
		}
	}
	v.Scrub = now
	d.putBeside(v)
	return nil
}

func (s *ReportScrub) op() string { return fmt.Sprintf("report scrub of %s", s.Volume) }

func (s *ReportScrub) validate() error {
	switch {
	case !s.Done && s.Next <= s.From:
		return fmt.Errorf("range from block %d to %d: %w", s.From, s.Next, trivet.ErrInvalid)
	case s.CheckedBytes < 0 || s.Found < 0 || s.Repaired < 0 || s.Left < 0:
		return fmt.Errorf("counts %d, %d, %d, %d: %w", s.CheckedBytes, s.Found, s.Repaired, s.Left, trivet.ErrInvalid)
	case len(s.Findings) > scrubFindingsMax || len(s.Absent) > replicasMax:
		return fmt.Errorf("%d findings, %d absent: %w", len(s.Findings), len(s.Absent), trivet.ErrInvalid)
	}
	for _, f := range s.Findings {
		if err := validateText("finding", f, findingBytesMax); err != nil {
			return err
		}
	}
	for _, n := range s.Absent {
		if err := trivet.ValidateNodeID(string(n)); err != nil {
			return err
		}
	}
	return validateVolume(s.Volume)
}

func (s *ReportScrub) apply(d *draft) error {
	v, err := d.edit(s.Volume)
	if err != nil {
		return err
	}
	if !v.Scrubbing() || v.Scrub.Pass != s.Pass || v.Scrub.Next != s.From {
		return nil
	}
	now := v.Scrub.clone()
	now.CheckedBytes += s.CheckedBytes
	now.Found, now.Repaired, now.Left = now.Found+s.Found, now.Repaired+s.Repaired, now.Left+s.Left
	for _, f := range s.Findings {
		if len(now.Findings) < scrubFindingsMax {
			now.Findings = append(now.Findings, f)
		}
	}
	for _, n := range s.Absent {
		if !slices.Contains(now.Absent, n) && len(now.Absent) < replicasMax {
			now.Absent = append(now.Absent, n)
		}
	}
	now.Next = s.Next
	if s.Done {
		now.Running, now.Next, now.Ended = false, 0, instant(s.Time)
		if !now.Verify {
			now.LastStarted, now.LastEnded = now.Started, now.Ended
		}
	}
	v.Scrub = now
	d.putBeside(v)
	return nil
}

// putBeside stores a volume of which only what nobody decides on was changed: its revision stays.
func (d *draft) putBeside(v *Volume) {
	d.volumes = d.volumes.with(v.ID, v)
	d.changed = true
}
