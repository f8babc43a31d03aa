package main

import (
	"bufio"
	"encoding/json"
	"os"
	"sync"
	"time"
)

// opKind is what a client asked for.
type opKind string

const (
	opRead  opKind = "read"
	opWrite opKind = "write"
	opTrim  opKind = "trim" // a write of zeroes
	opFlush opKind = "flush"
)

// op is one operation on one block, or a flush. A request of several blocks is one op for each: Trivet
// promises more for small requests, this check asks for blocks only.
type op struct {
	Volume     int    `json:"volume"`
	Client     int    `json:"client"`
	Kind       opKind `json:"kind"`
	LBA        int    `json:"lba"`
	Sequence   uint64 `json:"sequence"`   // written or read; 0 = zeroes
	Attachment int    `json:"attachment"` // of the client, from 1
	Call       int64  `json:"call"`       // ns since the start of the history
	Return     int64  `json:"return"`
	OK         bool   `json:"ok"` // false: the outcome of a write is unknown; a read says nothing
	Late       bool   `json:"late,omitempty"`
	Err        string `json:"err,omitempty"`
}

// history is what all clients saw. It is safe for concurrent use.
type history struct {
	start time.Time

	mu         sync.Mutex
	ops        []op
	violations []string
	fences     map[fence]int64 // when everything older than an attachment was fenced for certain
	counts     map[opKind]*outcomes
	lastOK     map[int]int64 // of each volume
	served     map[served]int64
	longest    map[int]int64
}

// fence is the beginning of an attachment of a volume.
type fence struct{ volume, attachment int }

// served is a kind of request of a volume; its last success is kept by when it was begun.
type served struct {
	volume int
	kind   opKind
}

// outcomes counts requests, not blocks.
type outcomes struct{ ok, failed int }

func newHistory() *history {
	return &history{
		start: time.Now(), fences: map[fence]int64{}, counts: map[opKind]*outcomes{},
		lastOK: map[int]int64{}, longest: map[int]int64{}, served: map[served]int64{},
	}
}

// now is the time in the history: monotonic, in ns.
func (h *history) now() int64 { return int64(time.Since(h.start)) }

// add records the ops of one request. Late ones, of an attachment that is over, do not count as activity.
func (h *history) add(ops []op) {
	if len(ops) == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, ops...)
	first := ops[0]
	if first.Late {
		return
	}
	c := h.counts[first.Kind]
	if c == nil {
		c = &outcomes{}
		h.counts[first.Kind] = c
	}
	if !first.OK {
		c.failed++
		return
	}
	c.ok++
	key := served{first.Volume, first.Kind}
	h.served[key] = max(h.served[key], first.Call)
	last, ok := h.lastOK[first.Volume]
	if !ok {
		last = first.Call
	}
	h.longest[first.Volume] = max(h.longest[first.Volume], first.Return-last)
	h.lastOK[first.Volume] = max(last, first.Return)
}

// attached records that an attachment serves, so that every earlier one of the volume is fenced.
func (h *history) attached(volume, attachment int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fences[fence{volume, attachment}] = h.now()
}

// servedSince reports whether a request that was begun after since succeeded.
func (h *history) servedSince(volume int, kind opKind, since int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.served[served{volume, kind}] > since
}

// violation records something that must never be.
func (h *history) violation(text string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.violations = append(h.violations, text)
}

// activity returns how many requests succeeded, and all.
func (h *history) activity() (succeeded, all int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.counts {
		succeeded, all = succeeded+c.ok, all+c.ok+c.failed
	}
	return succeeded, all
}

// write saves the history as a line of JSON for each op.
func (h *history) write(path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := f.Close(); err == nil {
			err = closeErr
		}
	}()
	h.mu.Lock()
	defer h.mu.Unlock()
	w := bufio.NewWriter(f)
	enc := json.NewEncoder(w)
	for _, o := range h.ops {
		if err := enc.Encode(o); err != nil {
			return err
		}
	}
	return w.Flush()
}
