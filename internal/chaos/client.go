package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"syscall"
	"time"
)

const (
	clientsN = 4 // of each volume

	// lateClient is the number of the client that uses fenced attachments, finalClient of the last reader.
	lateClient  = 90 // and 91
	finalClient = 99

	// opPause is how long a client pauses on average: eight clients make 100-400 requests a second.
	opPause = 15 * time.Millisecond

	// runBlocksMax is how many blocks a request has at most.
	runBlocksMax = 4
)

// client reads and writes blocks of one volume and records what it sees.
type client struct {
	id     int
	volume *volume
	rng    *rand.Rand
}

// work does requests until ctx ends, at whichever attachment the volume has.
func (c *client) work(ctx context.Context) {
	last := 0
	for {
		a := c.volume.await(ctx, last)
		if a == nil {
			return
		}
		c.use(ctx, a)
		if ctx.Err() != nil {
			return
		}
		a.leave()
		last = a.number
	}
}

// use does requests at a until it is over, or something is wrong with it. After an error the attachment is of no
// use: a write whose outcome is unknown makes every later flush of the attachment fail (H14).
func (c *client) use(ctx context.Context, a *attachment) {
	conn, err := dialNBD(ctx, a.socket)
	if err != nil {
		return
	}
	defer conn.close()
	for {
		err := c.one(conn, a)
		if err != nil && !errors.Is(err, nbdError(syscall.ENOSPC)) {
			return
		}
		wait := time.Duration(c.rng.ExpFloat64() * float64(opPause))
		if err != nil {
			wait += 20 * opPause
		}
		select {
		case <-ctx.Done():
			return
		case <-a.over:
			return
		case <-time.After(min(wait, time.Second)):
		}
	}
}

// one does one request, drawn, and records it.
func (c *client) one(conn *nbdConn, a *attachment) error {
	lba, n := c.draw()
	switch p := c.rng.IntN(100); {
	case p < 45:
		return c.read(conn, a, lba, n, false)
	case p < 90:
		return c.write(conn, a, lba, n, false)
	case p < 97:
		return c.record(a, opFlush, -1, make([]uint64, 1), false, func() error {
			return conn.do(a.patience, nbdFlush, 0, 0, nil, nil)
		})
	default:
		return c.record(a, opTrim, lba, make([]uint64, n), false, func() error {
			return conn.do(a.patience, nbdTrim, int64(lba)*blockBytes, n*blockBytes, nil, nil)
		})
	}
}

// draw returns a range of blocks.
func (c *client) draw() (lba, n int) {
	lba = c.rng.IntN(blocksN)
	return lba, min(1+c.rng.IntN(runBlocksMax), blocksN-lba)
}

func (c *client) write(conn *nbdConn, a *attachment, lba, n int, late bool) error {
	buf, sequences := make([]byte, n*blockBytes), make([]uint64, n)
	for i := range n {
		sequences[i] = c.volume.sequence.Add(1)
		s := stamp{Volume: c.volume.index, LBA: lba + i, Attachment: a.number, Sequence: sequences[i]}
		s.fill(buf[i*blockBytes : (i+1)*blockBytes])
	}
	return c.record(a, opWrite, lba, sequences, late, func() error {
		return conn.do(a.wait(late), nbdWrite, int64(lba)*blockBytes, len(buf), buf, nil)
	})
}

func (c *client) read(conn *nbdConn, a *attachment, lba, n int, late bool) error {
	buf, sequences := make([]byte, n*blockBytes), make([]uint64, n)
	return c.record(a, opRead, lba, sequences, late, func() error {
		if err := conn.do(a.wait(late), nbdRead, int64(lba)*blockBytes, len(buf), nil, buf); err != nil {
			return err
		}
		for i := range n {
			s, err := readStamp(buf[i*blockBytes:(i+1)*blockBytes], c.volume.index, lba+i)
			if err != nil {
				c.volume.history.violation(c.volume.name + ": " + err.Error())
			}
			sequences[i] = s.Sequence
		}
		return nil
	})
}

// record runs do and adds one op for each sequence, which do may fill in.
func (c *client) record(a *attachment, kind opKind, lba int, sequences []uint64, late bool, do func() error) error {
	h := c.volume.history
	call := h.now()
	err := do()
	end := h.now()
	ops := make([]op, 0, len(sequences))
	for i, s := range sequences {
		o := op{
			Volume: c.volume.index, Client: c.id, Kind: kind, LBA: lba + i, Sequence: s, Attachment: a.number, Call: call,
			Return: end, OK: err == nil, Late: late,
		}
		if err != nil {
			o.Err = err.Error()
		}
		ops = append(ops, o)
	}
	h.add(ops)
	return err
}

// readAll reads every block once, at whichever attachments it takes.
func (c *client) readAll(ctx context.Context) error {
	last := 0
	for lba := 0; lba < blocksN; {
		a := c.volume.await(ctx, last)
		if a == nil {
			return context.Cause(ctx)
		}
		conn, err := dialNBD(ctx, a.socket)
		for err == nil && lba < blocksN {
			if err = c.read(conn, a, lba, 1, false); err == nil {
				lba++
			}
		}
		if conn != nil {
			conn.close()
		}
		if err != nil {
			a.leave()
			last = a.number
		}
	}
	return nil
}
