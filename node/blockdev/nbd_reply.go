package blockdev

import (
	"encoding/binary"
	"io"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
)

const (
	// nbdOutBytes is how many bytes of short replies gather while another reply is being sent.
	nbdOutBytes = 128 << 10

	// nbdStallWait is how long a client may leave a reply unread, or a request half sent, before it is
	// cut off. It hurts nobody but itself meanwhile: its buffers are its own.
	nbdStallWait = 60 * time.Second
)

// nbdWriter sends the replies of one connection. Who finds nobody sending sends, and goes on as long
// as others leave short replies behind: under load many replies share one system call, and a lone one
// waits for nothing. Safe for concurrent use; nothing is allocated.
type nbdWriter struct {
	conn  io.WriteCloser
	stall func(time.Time) error // sets the deadline of a write; nil: there is none
	mode  nbdMode

	mu    sync.Mutex
	idle  sync.Cond // busy ended, or out was taken
	busy  bool      // somebody sends
	out   []byte    // short replies; somebody who holds or waits for mu sends them
	spare []byte    // the other half of a double buffer
	dead  bool      // the connection is closed
}

func newNBDWriter(conn io.WriteCloser, mode nbdMode) *nbdWriter {
	w := &nbdWriter{conn: conn, mode: mode, out: make([]byte, 0, nbdOutBytes), spare: make([]byte, 0, nbdOutBytes)}
	w.idle.L = &w.mu
	if d, ok := conn.(interface{ SetWriteDeadline(t time.Time) error }); ok {
		w.stall = d.SetWriteDeadline
	}
	return w
}

// short sends head and payload, which together are at most nbdOutBytes. Both are copied.
func (w *nbdWriter) short(head, payload []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.out)+len(head)+len(payload) > nbdOutBytes && !w.dead {
		if w.busy {
			w.idle.Wait()
		} else {
			w.sendLocked(nil)
		}
	}
	if w.dead {
		return
	}
	w.out = append(append(w.out, head...), payload...)
	if !w.busy {
		w.sendLocked(nil)
	}
}

// long sends b without copying it.
func (w *nbdWriter) long(b []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.busy && !w.dead {
		w.idle.Wait()
	}
	if !w.dead {
		w.sendLocked(b)
	}
}

// alone runs send while no other reply is sent; it uses raw. An error closes the connection.
func (w *nbdWriter) alone(send func() error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.busy && !w.dead {
		w.idle.Wait()
	}
	if w.dead {
		return
	}
	w.busy = true
	w.mu.Unlock()
	err := send()
	w.mu.Lock()
	w.busy = false
	if err != nil {
		w.dieLocked()
		return
	}
	w.sendLocked(nil)
}

// sendLocked sends first, if any, and then the short replies until there are none. It gives up mu
// while it writes. REQUIRES: not busy.
func (w *nbdWriter) sendLocked(first []byte) {
	w.busy = true
	b := first
	for !w.dead {
		short := b == nil
		if short {
			if len(w.out) == 0 {
				break
			}
			b, w.out, w.spare = w.out, w.spare, nil
		}
		w.mu.Unlock()
		err := w.raw(b)
		w.mu.Lock()
		if short {
			w.spare = b[:0]
		}
		if err != nil {
			w.dieLocked()
		}
		w.idle.Broadcast()
		b = nil
	}
	w.busy = false
	w.idle.Broadcast()
}

// dieLocked closes the connection, which ends the reader, who reports.
func (w *nbdWriter) dieLocked() {
	w.dead = true
	_ = w.conn.Close() // nothing more to lose
	w.idle.Broadcast()
}

func (w *nbdWriter) raw(b []byte) error {
	if w.stall != nil {
		if err := w.stall(time.Now().Add(nbdStallWait)); err != nil {
			return err
		}
	}
	_, err := w.conn.Write(b)
	return err
}

// putHeader writes the header of a reply or chunk that carries n bytes of payload into the end of b,
// and returns that end. REQUIRES: b has room; n below 4 GiB unless extended.
func (w *nbdWriter) putHeader(b []byte, r *nbdRequest, kind uint16, done bool, errno uint32, n int) []byte {
	flags := uint16(0)
	if done {
		flags = nbdChunkDone
	}
	switch w.mode {
	case nbdExtended:
		b = b[len(b)-nbdExtChunkBytes:]
		binary.BigEndian.PutUint32(b, nbdExtChunkMagic)
		binary.BigEndian.PutUint64(b[16:], r.offBytes) // proto.md: the request's own
		binary.BigEndian.PutUint64(b[24:], uint64(n))
	case nbdStructured:
		b = b[len(b)-nbdChunkBytes:]
		binary.BigEndian.PutUint32(b, nbdChunkMagic)
		binary.BigEndian.PutUint32(b[16:], uint32(n))
	default:
		b = b[len(b)-nbdSimpleBytes:]
		binary.BigEndian.PutUint32(b, nbdSimpleMagic)
		binary.BigEndian.PutUint32(b[4:], errno)
		binary.BigEndian.PutUint64(b[8:], r.cookie)
		return b
	}
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], kind)
	binary.BigEndian.PutUint64(b[8:], r.cookie)
	return b
}

// ok says that a request without data to return is done.
func (w *nbdWriter) ok(r *nbdRequest) {
	var head [nbdExtChunkBytes]byte
	w.short(w.putHeader(head[:], r, nbdChunkNone, true, 0, 0), nil)
}

// fail says that a request has failed, and with structured replies why.
func (w *nbdWriter) fail(r *nbdRequest, err error) {
	var (
		head [nbdExtChunkBytes]byte
		text [6 + nbdMessageMax]byte
	)
	if w.mode == nbdSimple {
		w.short(w.putHeader(head[:], r, 0, true, nbdErrno(err), 0), nil)
		return
	}
	message := validPrefix(err.Error(), nbdMessageMax)
	binary.BigEndian.PutUint32(text[:], nbdErrno(err))
	binary.BigEndian.PutUint16(text[4:], uint16(len(message)))
	n := 6 + copy(text[6:], message)
	w.short(w.putHeader(head[:], r, nbdChunkError, true, 0, n), text[:n])
}

// data sends n bytes read into buf from the part r of the request whole.
func (w *nbdWriter) data(whole, r *nbdRequest, buf *buffer, n int64, done bool) {
	if w.mode == nbdSimple {
		var head [nbdSimpleBytes]byte
		w.payload(w.putHeader(head[:], r, 0, true, 0, 0), buf, n)
		return
	}
	// A hole is quicker to send, and the client's copy of the volume stays thin.
	if r.flags&nbdFlagDF == 0 && n > smallBytes && allZero(buf.payload(n)) {
		var head [nbdExtChunkBytes]byte
		var hole [12]byte
		binary.BigEndian.PutUint64(hole[:], r.offBytes)
		binary.BigEndian.PutUint32(hole[8:], uint32(n))
		w.short(w.putHeader(head[:], whole, nbdChunkHole, done, 0, len(hole)), hole[:])
		return
	}
	var head [nbdExtChunkBytes + 8]byte
	binary.BigEndian.PutUint64(head[nbdExtChunkBytes:], r.offBytes)
	h := w.putHeader(head[:nbdExtChunkBytes], whole, nbdChunkData, done, 0, int(n)+8)
	w.payload(h[:len(h)+8], buf, n)
}

// payload sends the header head and n bytes of buf's payload: short ones with others, long ones in
// place, with the header in buf's head room.
func (w *nbdWriter) payload(head []byte, buf *buffer, n int64) {
	if n <= smallBytes {
		w.short(head, buf.payload(n))
		return
	}
	b := buf.withHeader(int64(len(head)), n)
	copy(b, head)
	w.long(b)
}

// status sends the runs of a block status request. tmp has room for them.
func (w *nbdWriter) status(r *nbdRequest, runs []trivet.Run, tmp []byte) {
	var head [nbdExtChunkBytes]byte
	b := binary.BigEndian.AppendUint32(tmp[:0], nbdAllocationID)
	kind := uint16(nbdChunkStatus)
	if w.mode == nbdExtended {
		kind = nbdChunkStatusExt
		b = binary.BigEndian.AppendUint32(b, uint32(len(runs)))
	}
	for _, run := range runs {
		state := uint32(nbdStateHole | nbdStateZero)
		if run.Allocated {
			state = 0
		}
		if w.mode == nbdExtended {
			b = binary.BigEndian.AppendUint64(b, uint64(run.LenBytes))
			b = binary.BigEndian.AppendUint64(b, uint64(state))
		} else {
			b = binary.BigEndian.AppendUint32(b, uint32(run.LenBytes))
			b = binary.BigEndian.AppendUint32(b, state)
		}
	}
	w.short(w.putHeader(head[:], r, kind, true, 0, len(b)), b)
}
