package controller

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
)

// The parameters that say how fast a volume may and must be. All of them may change while it is in use.
const (
	ParamIOPSLimit           = "iopsLimit"           // requests/s, reads and writes; a quantity; 0 or absent = none
	ParamReadIOPSLimit       = "readIopsLimit"       // the same of reads
	ParamWriteIOPSLimit      = "writeIopsLimit"      // the same of writes
	ParamBandwidthLimit      = "bandwidthLimit"      // bytes/s, reads and writes; a quantity; 0 or absent = none
	ParamReadBandwidthLimit  = "readBandwidthLimit"  // the same of reads
	ParamWriteBandwidthLimit = "writeBandwidthLimit" // the same of writes
	ParamBurst               = "burst"               // seconds of its limits that an idle volume saves up; default 0
	ParamIOPSReservation     = "iopsReservation"     // requests/s that others leave it; a quantity; 0 or absent = none
	ParamPriority            = "priority"            // 0 to 100, a share beside others; default 50
	ParamIOScheduler         = "ioScheduler"         // noop, deadline (default) or fair
)

// IOScheduler is the order in which a volume's dirty blocks are written back.
type IOScheduler string

// The schedulers.
const (
	SchedulerNoop     IOScheduler = "noop"     // as they were written
	SchedulerDeadline IOScheduler = "deadline" // by place, but none waits for longer than its deadline
	SchedulerFair     IOScheduler = "fair"     // in turns between the regions that are written to
)

const (
	// PriorityDefault is in the middle, so that there is room on both sides.
	PriorityDefault = 50
	priorityMax     = 100
	burstMax        = time.Hour // iothrottle.BurstMax
)

// QoS is the quality of service of a volume. Limits are per second, 0 = none.
type QoS struct {
	IOPSLimit, ReadIOPSLimit, WriteIOPSLimit                int64 // requests
	BandwidthLimit, ReadBandwidthLimit, WriteBandwidthLimit int64 // bytes

	Burst           time.Duration // whole seconds
	IOPSReservation int64         // requests/s
	Priority        int           // 0 to 100
	Scheduler       IOScheduler
}

// DefaultQoS returns what a volume gets that asks for nothing.
func DefaultQoS() QoS { return QoS{Priority: PriorityDefault, Scheduler: SchedulerDeadline} }

// quantities are the fields that hold a quantity, by parameter.
func (q *QoS) quantities() []struct {
	key string
	at  *int64
} {
	return []struct {
		key string
		at  *int64
	}{
		{ParamIOPSLimit, &q.IOPSLimit},
		{ParamReadIOPSLimit, &q.ReadIOPSLimit},
		{ParamWriteIOPSLimit, &q.WriteIOPSLimit},
		{ParamBandwidthLimit, &q.BandwidthLimit},
		{ParamReadBandwidthLimit, &q.ReadBandwidthLimit},
		{ParamWriteBandwidthLimit, &q.WriteBandwidthLimit},
		{ParamIOPSReservation, &q.IOPSReservation},
	}
}

// set sets the field of a parameter in lower case, and reports whether there is one.
func (q *QoS) set(lower, value string) (known bool, err error) {
	for _, f := range q.quantities() {
		if lower == strings.ToLower(f.key) {
			*f.at, err = parseQuantity(value)
			return true, err
		}
	}
	switch lower {
	case ParamBurst:
		q.Burst, err = parseSeconds(value)
	case ParamPriority:
		q.Priority, err = parsePriority(value)
	case strings.ToLower(ParamIOScheduler):
		err = oneOf(value, func(v string) { q.Scheduler = IOScheduler(v) },
			string(SchedulerNoop), string(SchedulerDeadline), string(SchedulerFair))
	default:
		return false, nil
	}
	return true, err
}

// check refuses what contradicts itself.
func (q *QoS) check() error {
	if q.IOPSLimit > 0 && q.IOPSReservation > q.IOPSLimit {
		return fmt.Errorf("parameter %q: %d is more than the %q of %d: %w", ParamIOPSReservation, q.IOPSReservation,
			ParamIOPSLimit, q.IOPSLimit, trivet.ErrInvalid)
	}
	return nil
}

// put adds what differs from the defaults to canonical parameters.
func (q *QoS) put(m map[string]string) {
	for _, f := range q.quantities() {
		if *f.at > 0 {
			m[f.key] = strconv.FormatInt(*f.at, 10)
		}
	}
	if q.Burst > 0 {
		m[ParamBurst] = strconv.FormatInt(int64(q.Burst/time.Second), 10)
	}
	if q.Priority != PriorityDefault {
		m[ParamPriority] = strconv.Itoa(q.Priority)
	}
	if q.Scheduler != SchedulerDeadline {
		m[ParamIOScheduler] = string(q.Scheduler)
	}
}

// parseSeconds reads a whole number of seconds, with an s behind it if wanted.
func parseSeconds(s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(strings.TrimSuffix(s, "s"), 10, 31) // no sign, no space
	if d := time.Duration(n) * time.Second; err == nil && d <= burstMax {
		return d, nil
	}
	return 0, fmt.Errorf("value %q: want whole seconds, at most %d: %w", s, burstMax/time.Second, trivet.ErrInvalid)
}

func parsePriority(s string) (int, error) {
	if s == "" {
		return PriorityDefault, nil
	}
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil || n > priorityMax {
		return 0, fmt.Errorf("value %q: want 0 to %d: %w", s, priorityMax, trivet.ErrInvalid)
	}
	return int(n), nil
}
