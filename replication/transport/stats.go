package transport

import "sync/atomic"

// Stats counts what happened since NewPeers; the fields ending in N are current numbers.
type Stats struct {
	Dials        uint64 // attempts
	DialFailures uint64
	Accepted     uint64 // connections served
	Refused      uint64 // connections refused or ended for the far end's identity or role
	Timeouts     uint64 // connections found dead
	BadFrames    uint64 // connections ended for a malformed frame

	FramesSent     uint64
	FramesReceived uint64
	BytesSent      uint64
	BytesReceived  uint64

	Cancels uint64 // calls given up after their request was sent
	Busy    uint64 // requests refused for want of room

	ConnsOutN int
	ConnsInN  int
	HandlersN int // requests of other nodes being handled
}

// counters is Stats while counting.
type counters struct {
	dials, dialFailures, accepted, refused, timeouts, badFrames atomic.Uint64
	framesSent, framesReceived, bytesSent, bytesReceived        atomic.Uint64
	cancels, busy                                               atomic.Uint64
	handlers                                                    atomic.Int64
}

func (c *counters) sent(n int) {
	c.framesSent.Add(1)
	c.bytesSent.Add(uint64(n))
}

func (c *counters) received(n int) {
	c.framesReceived.Add(1)
	c.bytesReceived.Add(uint64(n))
}

// Stats returns the counters; it may be called at any time.
func (p *Peers) Stats() Stats {
	c := &p.stats
	s := Stats{
		Dials: c.dials.Load(), DialFailures: c.dialFailures.Load(), Accepted: c.accepted.Load(),
		Refused: c.refused.Load(), Timeouts: c.timeouts.Load(), BadFrames: c.badFrames.Load(),
		FramesSent: c.framesSent.Load(), FramesReceived: c.framesReceived.Load(),
		BytesSent: c.bytesSent.Load(), BytesReceived: c.bytesReceived.Load(),
		Cancels: c.cancels.Load(), Busy: c.busy.Load(), HandlersN: int(c.handlers.Load()),
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.routes {
		if r.conn != nil {
			s.ConnsOutN++
		}
	}
	for _, conns := range p.accepted {
		s.ConnsInN += len(conns)
	}
	return s
}
