package transport

import (
	"math/bits"
	"sync"
)

// bufferPool keeps buffers for outgoing frames, by classes of their size: four to each power of two, so that a message
// a little larger than one does not take twice as much. Incoming bodies are not pooled: they belong to the handlers for
// good (Handler).
type bufferPool struct {
	classes [4*(24-bufferBitsMin) + 1]sync.Pool // of *[]byte
}

// bufferBitsMin makes the smallest class 256 bytes: most frames without data fit.
const bufferBitsMin = 8

// bufferClass returns the class of buffers of n bytes, and how large they are. REQUIRES: 0 < n < 2*MessageBytesMax.
func bufferClass(n int) (class, size int) {
	above := bits.Len(uint(n-1)) - 1 - bufferBitsMin // powers of two between the smallest class and n
	if above < 0 {
		return 0, 1 << bufferBitsMin
	}
	base := 1 << (bufferBitsMin + above)
	quarter := (n - base + base/4 - 1) / (base / 4)
	return 4*above + quarter, base + quarter*(base/4)
}

// get returns a buffer of n bytes with arbitrary content. REQUIRES: 0 < n < 2*MessageBytesMax.
func (p *bufferPool) get(n int) []byte {
	c, size := bufferClass(n)
	if b, ok := p.classes[c].Get().(*[]byte); ok {
		return (*b)[:n]
	}
	return make([]byte, n, size)
}

// put takes back a buffer of get.
func (p *bufferPool) put(b []byte) {
	full := b[:cap(b)]
	c, _ := bufferClass(cap(b))
	p.classes[c].Put(&full)
}
