package sim

import (
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/trivet-csi/trivet"
)

// historyMax bounds the operations of one block: the time that porcupine needs grows fast with them.
const historyMax = 2000

// History is what the users of a volume asked for and were told, per block. It is checked by porcupine,
// beside the oracle and independently of it: a block is a register, a change without an answer may
// take effect at any later time, and every answer must fit in one order that agrees with time.
type History struct {
	mu     sync.Mutex
	clock  int64
	blocks []blockHistory
}

type blockHistory struct {
	ops  []operation
	full bool // nothing more is recorded
}

// operation is one read of a block, or one change to it.
type operation struct {
	call, ret int64 // on the history's clock; ret 0 = not answered
	read      bool
	value     version // 0 = zeroes
	dropped   bool
}

// opRef names an operation under way; the zero value is one that is not recorded.
type opRef struct{ lba, n int }

func newHistory(blockN int) *History { return &History{blocks: make([]blockHistory, blockN)} }

// begin records operations that begin now, one per block. A read has no values yet.
func (h *History) begin(lba trivet.LBA, n int, read bool, values []version) []opRef {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clock++
	refs := make([]opRef, n)
	for i := range n {
		b := &h.blocks[int(lba)+i]
		refs[i] = opRef{int(lba) + i, -1}
		if b.full {
			continue
		}
		if len(b.ops) >= historyMax {
			b.full = true
			continue
		}
		op := operation{call: h.clock, read: read}
		if !read {
			op.value = values[i]
		}
		refs[i].n = len(b.ops)
		b.ops = append(b.ops, op)
	}
	return refs
}

// end records the answer of operations that are now over. A read that was not answered says nothing;
// nor does one that ends after its block was no longer recorded: it may have seen a change that is not
// in the history.
func (h *History) end(refs []opRef, ok bool, values []version) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clock++
	for i, r := range refs {
		if r.n < 0 {
			continue
		}
		b := &h.blocks[r.lba]
		op := &b.ops[r.n]
		if op.read && (!ok || b.full) {
			op.dropped = true
			continue
		}
		if ok {
			op.ret = h.clock
		}
		if op.read {
			op.value = values[i]
		}
	}
}

// Len returns the number of operations.
func (h *History) Len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for i := range h.blocks {
		n += len(h.blocks[i].ops)
	}
	return n
}

// Check judges the history, spending at most limit on each block. It returns an error for a block
// whose answers fit in no order, and for one that could not be judged in time: such a run says nothing.
// It must be called outside of a bubble, whose clock stands still while it computes.
func (h *History) Check(limit time.Duration) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for lba := range h.blocks {
		switch h.blocks[lba].check(limit) {
		case porcupine.Ok:
		case porcupine.Unknown:
			return fmt.Errorf("history of block %d, %d operations: not judged within %v",
				lba, len(h.blocks[lba].ops), limit)
		default:
			return fmt.Errorf("history of block %d, %d operations: not linearizable", lba, len(h.blocks[lba].ops))
		}
	}
	return nil
}

// check judges one block. Zeroes look all the same, so a change to zero without an answer may explain
// every later read of zeroes, and a dozen of them make the search explode. Any of them may be left out,
// as it can always come last, so an order found without them is an order. So none is tried first, then each
// alone, then each two, and all of them only when there is no order even so.
func (b *blockHistory) check(limit time.Duration) porcupine.CheckResult {
	r := porcupine.CheckOperationsTimeout(register(), b.operations(nil), limit)
	if r != porcupine.Illegal {
		return r
	}
	all := map[int]bool{}
	var open []int
	for i := range b.ops {
		if o := &b.ops[i]; !o.read && !o.dropped && o.ret == 0 && o.value == 0 {
			all[i], open = true, append(open, i)
		}
	}
	end := time.Now().Add(limit)
	for i, a := range open {
		for _, c := range open[:i+1] { // the same one twice: a alone
			some := map[int]bool{a: true, c: true}
			if porcupine.CheckOperationsTimeout(register(), b.operations(some), fewZeroesMax) == porcupine.Ok {
				return porcupine.Ok
			}
			if time.Now().After(end) {
				return porcupine.Unknown
			}
		}
	}
	return porcupine.CheckOperationsTimeout(register(), b.operations(all), limit)
}

// fewZeroesMax bounds one search with one or two changes to zero that have no answer: mostly it takes milliseconds.
const fewZeroesMax = time.Second

// operations returns the history in porcupine's form. A change that was not answered stays open to the
// end; one to data that nobody has read is left out, and so are those to zero but the given ones.
func (b *blockHistory) operations(openZeroes map[int]bool) []porcupine.Operation {
	seen := map[version]bool{}
	for i := range b.ops {
		if o := &b.ops[i]; o.read && !o.dropped && o.ret != 0 {
			seen[o.value] = true
		}
	}
	seen[0] = false
	out := make([]porcupine.Operation, 0, len(b.ops))
	for i := range b.ops {
		o := &b.ops[i]
		ret := o.ret
		if ret == 0 {
			ret = math.MaxInt64
		}
		if o.dropped || o.read && o.ret == 0 || o.ret == 0 && !seen[o.value] && !openZeroes[i] {
			continue
		}
		out = append(out, porcupine.Operation{
			ClientId: 0, Input: *o, Call: o.call, Output: o.value, Return: ret,
		})
	}
	return out
}

// register is one block. Values are versions: each change to data has its own.
func register() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return version(0) },
		Step: func(state, input, output any) (bool, any) {
			op, ok := input.(operation)
			if !ok {
				return false, state
			}
			if op.read {
				return state == output, state
			}
			return true, op.value
		},
		Equal: func(a, b any) bool { return a == b },
	}
}
