package main

import (
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
)

// checkTimeout bounds the search of each volume; a verdict that is not reached fails the run.
const checkTimeout = 60 * time.Second

// fence times are ns of the history; forever is after its end.
const forever = math.MaxInt64

// check judges a history: every block is a linearizable register, a flushed write is never undone, and an
// attachment that was fenced does nothing. It returns what is wrong, and takes no longer than a minute a volume.
func check(ops []op, fences map[fence]int64) []string {
	wrong := checkWritten(ops)
	wrong = append(wrong, checkFences(ops, fences)...)
	wrong = append(wrong, checkFlushed(ops, fences)...)
	return append(wrong, checkLinearizable(ops)...)
}

// register is the model: one 4 KiB block, zero at first.
var register = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		blocks := map[int][]porcupine.Operation{}
		var order []int
		for _, o := range history {
			lba := inputOf(o).LBA
			if blocks[lba] == nil {
				order = append(order, lba)
			}
			blocks[lba] = append(blocks[lba], o)
		}
		slices.Sort(order)
		parts := make([][]porcupine.Operation, 0, len(order))
		for _, lba := range order {
			parts = append(parts, blocks[lba])
		}
		return parts
	},
	Init: func() any { return uint64(0) },
	Step: func(state, input, _ any) (bool, any) {
		o, ok := input.(op)
		if !ok {
			return false, state
		}
		if o.Kind == opRead {
			return o.Sequence == state, state
		}
		return true, o.Sequence
	},
	DescribeOperation: func(input, _ any) string { return fmt.Sprintf("%+v", input) },
}

func inputOf(o porcupine.Operation) op {
	in, _ := o.Input.(op) // operations makes nothing else
	return in
}

// operations turns the ops of a volume into porcupine's. A write whose outcome is unknown is open to the end of
// the history, and left out when nobody ever read it: then it may as well not have happened, and the search is
// exponential in open operations. A read that failed says nothing.
func operations(ops []op, volume int) []porcupine.Operation {
	type value struct {
		lba      int
		sequence uint64
	}
	read := map[value]bool{}
	for _, o := range ops {
		if o.Volume == volume && o.Kind == opRead && o.OK {
			read[value{o.LBA, o.Sequence}] = true
		}
	}
	var out []porcupine.Operation
	for _, o := range ops {
		if o.Volume != volume || o.Kind == opFlush {
			continue
		}
		end := o.Return
		if !o.OK {
			if o.Kind == opRead || !read[value{o.LBA, o.Sequence}] {
				continue
			}
			end = forever
		}
		out = append(out, porcupine.Operation{ClientId: o.Client, Input: o, Call: o.Call, Return: end})
	}
	return out
}

func checkLinearizable(ops []op) []string {
	var wrong []string
	for _, volume := range volumesOf(ops) {
		switch porcupine.CheckOperationsTimeout(register, operations(ops, volume), checkTimeout) {
		case porcupine.Ok:
		case porcupine.Illegal:
			wrong = append(wrong, fmt.Sprintf("vol%d: the history is not linearizable%s", volume+1, culprits(ops, volume)))
		case porcupine.Unknown:
			wrong = append(wrong, fmt.Sprintf("vol%d: not decided within %s whether the history is linearizable", volume+1,
				checkTimeout))
		}
	}
	return wrong
}

// culprits names the blocks whose history is at fault.
func culprits(ops []op, volume int) string {
	text := ""
	for _, part := range register.Partition(operations(ops, volume)) {
		if porcupine.CheckOperationsTimeout(register, part, checkTimeout) == porcupine.Illegal {
			text += fmt.Sprintf(" (lba %d)", inputOf(part[0]).LBA)
		}
	}
	return text
}

func volumesOf(ops []op) []int {
	var volumes []int
	for _, o := range ops {
		if !slices.Contains(volumes, o.Volume) {
			volumes = append(volumes, o.Volume)
		}
	}
	slices.Sort(volumes)
	return volumes
}

// checkWritten finds reads of what nobody had begun to write.
func checkWritten(ops []op) []string {
	type value struct {
		volume, lba int
		sequence    uint64
	}
	begun := map[value]int64{}
	for _, o := range ops {
		if o.Kind == opWrite {
			begun[value{o.Volume, o.LBA, o.Sequence}] = o.Call
		}
	}
	var wrong []string
	for _, o := range ops {
		if o.Kind != opRead || !o.OK || o.Sequence == 0 {
			continue
		}
		if at, ok := begun[value{o.Volume, o.LBA, o.Sequence}]; !ok || at > o.Return {
			wrong = append(wrong, fmt.Sprintf("vol%d lba %d: sequence %d was read before it was written: %+v", o.Volume+1, o.LBA,
				o.Sequence, o))
		}
	}
	return wrong
}

// checkFences finds reads and writes that succeeded though they were begun when a later attachment of the volume
// was being served, and reads of such writes (H12).
func checkFences(ops []op, fences map[fence]int64) []string {
	var wrong []string
	type write struct {
		volume   int
		sequence uint64
	}
	refused := map[write]bool{}
	for _, o := range ops {
		if at := fencedAt(fences, o); o.Call <= at {
			continue
		}
		if o.OK && o.Kind != opFlush { // a flush may: a fence does not undo what is committed
			wrong = append(wrong, fmt.Sprintf("vol%d lba %d: a %s of attachment %d succeeded after it was fenced: %+v",
				o.Volume+1,
				o.LBA, o.Kind, o.Attachment, o))
		}
		if o.Kind == opWrite {
			refused[write{o.Volume, o.Sequence}] = true
		}
	}
	for _, o := range ops {
		if o.Kind == opRead && o.OK && refused[write{o.Volume, o.Sequence}] {
			wrong = append(wrong, fmt.Sprintf("vol%d lba %d: sequence %d was written by a fenced attachment and is there: %+v",
				o.Volume+1, o.LBA, o.Sequence, o))
		}
	}
	return wrong
}

// fencedAt is when the attachment of o was over for certain.
func fencedAt(fences map[fence]int64, o op) int64 {
	at := int64(forever)
	for f, t := range fences {
		if f.volume == o.Volume && f.attachment > o.Attachment {
			at = min(at, t)
		}
	}
	return at
}

// checkFlushed is independent of porcupine and its model: a read never returns a write that was over, known or
// fenced, before another write to the block began which was acknowledged and then flushed before the read. A
// write whose outcome is unknown is over when its attachment is fenced.
func checkFlushed(ops []op, fences map[fence]int64) []string {
	type place struct{ volume, lba int }
	blocks := map[place][]op{}
	flushes := map[int][]op{}
	for _, o := range ops {
		switch o.Kind {
		case opFlush:
			if o.OK {
				flushes[o.Volume] = append(flushes[o.Volume], o)
			}
		case opTrim: // zeroes do not say which trim they are of
		case opRead, opWrite:
			p := place{o.Volume, o.LBA}
			blocks[p] = append(blocks[p], o)
		}
	}
	var wrong []string
	for p, block := range blocks {
		wrong = append(wrong, checkBlockFlushed(block, flushes[p.volume], fences)...)
	}
	slices.Sort(wrong)
	return wrong
}

// flushedWrite is a write that was acknowledged, and when the first flush that covers it was.
type flushedWrite struct {
	call    int64
	flushed int64
}

func checkBlockFlushed(block, flushes []op, fences map[fence]int64) []string {
	over := map[uint64]int64{} // sequence -> when the write was over
	var covered []flushedWrite
	for _, o := range block {
		if o.Kind != opWrite {
			continue
		}
		over[o.Sequence] = fencedAt(fences, o)
		if !o.OK {
			continue
		}
		over[o.Sequence] = o.Return
		first := int64(forever)
		for _, f := range flushes {
			if f.Call > o.Return {
				first = min(first, f.Return)
			}
		}
		covered = append(covered, flushedWrite{call: o.Call, flushed: first})
	}
	var wrong []string
	for _, o := range block {
		if o.Kind != opRead || !o.OK || o.Sequence == 0 {
			continue
		}
		for _, w := range covered {
			if over[o.Sequence] < w.call && w.flushed < o.Call {
				wrong = append(wrong, fmt.Sprintf("vol%d lba %d: a flushed write was undone; sequence %d, older, was read: %+v",
					o.Volume+1, o.LBA, o.Sequence, o))
				break
			}
		}
	}
	return wrong
}
