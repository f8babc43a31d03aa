package transport

import (
	"math/bits"
	"sync"
)

// bufferPool keeps buffers for outgoing frames, by powers of two of their size. Incoming bodies are
// not pooled: they belong to the handlers for good (Handler).
type bufferPool struct {
	classes [25]sync.Pool // of *[]byte; class i has buffers of 1<<i bytes
}

// bufferClassMin is the smallest class, 256 bytes: most frames without data fit.
const bufferClassMin = 8

func bufferClass(n int) int { return max(bits.Len(uint(n-1)), bufferClassMin) }

// get returns a buffer of n bytes with arbitrary content. REQUIRES: 0 < n < 2*MessageBytesMax.
func (p *bufferPool) get(n int) []byte {
	c := bufferClass(n)
	if b, ok := p.classes[c].Get().(*[]byte); ok {
		return (*b)[:n]
	}
	return make([]byte, n, 1<<c)
}

// put takes back a buffer of get.
func (p *bufferPool) put(b []byte) {
	full := b[:cap(b)]
	p.classes[bufferClass(cap(b))].Put(&full)
}
