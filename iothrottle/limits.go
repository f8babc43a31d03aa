package iothrottle

import "time"

// BurstMax bounds Limits.Burst.
const BurstMax = time.Hour

// Limits of one volume. Zero or less means unlimited. Those of reads, of writes and of both together
// hold at the same time. Discard and WriteZeroes count as writes.
type Limits struct {
	IOPS      int64 // requests per second, reads and writes together
	ReadIOPS  int64
	WriteIOPS int64

	BytesPerSec      int64 // bytes per second, reads and writes together
	ReadBytesPerSec  int64
	WriteBytesPerSec int64

	// Burst is how long an idle volume saves up what it does not use of its limits; it may then use it at
	// any speed. It is time, as the burst credits of SolidFire and of Azure's disks are, and not a number of
	// requests, so that it holds for all six limits and follows them when they change. Zero: 100 ms, which
	// the limits' accuracy allows for; at most BurstMax. A volume begins without credit.
	Burst time.Duration
}

// unlimited reports whether nothing is held back; Burst alone holds nothing back.
func (l *Limits) unlimited() bool {
	return max(l.IOPS, l.ReadIOPS, l.WriteIOPS, l.BytesPerSec, l.ReadBytesPerSec, l.WriteBytesPerSec) <= 0
}

// Counts is what a Throttle has let through since it was made.
type Counts struct {
	ReadN, WriteN         int64 // requests; Discard and WriteZeroes are writes
	ReadBytes, WriteBytes int64 // of ReadAt and WriteAt
	WaitedN               int64 // requests that were held back
}
