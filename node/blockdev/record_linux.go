package blockdev

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// Each attachment has a folder RunDir/<name>:
//
//	device       of the transport fuse: its file, mounted over an empty one
//	record.json  what the kernel was made to hold; replaced by rename, written before the act
//	lock         held with flock(2) while the process that made the attachment lives
const (
	deviceName    = "device"
	recordName    = "record.json"
	lockName      = "lock"
	recordVersion = 2
	recordMax     = 64 << 10 // bytes

	bootIDPath = "/proc/sys/kernel/random/boot_id"
)

// record is what another process needs to undo or resume an attachment. The kernel's state dies with
// the boot, so the file need not be durable, only whole.
//
// Version 1 knew fuse only and had the members of fuseState beside the others; it is still read.
type record struct {
	Version   int             `json:"version"`
	Kind      Kind            `json:"kind"` // of the transport
	Name      string          `json:"name"`
	BootID    string          `json:"bootId"`
	PID       int             `json:"pid"`       // in the pid namespace of the writer
	StartTick uint64          `json:"startTick"` // of the process, in clock ticks since boot
	State     json.RawMessage `json:"state"`     // of the transport
}

// folder is an attachment's folder, locked.
type folder struct {
	path   string
	lock   *os.File
	corpse bool // the lock is held by a process that was killed and cannot die: see ownerIsDead
}

func (f *folder) file(name string) string { return filepath.Join(f.path, name) }

func (f *folder) name() string { return filepath.Base(f.path) }

// errAlive is returned by lockFolder if the process that made the attachment lives.
var errAlive = fmt.Errorf("its process is alive: %w", trivet.ErrInUse)

// lockFolder takes the lock of the folder, which it makes if create is set. It returns errAlive
// if another process, or another attachment of this one, holds it.
func lockFolder(path string, create bool) (*folder, error) {
	flags := os.O_RDWR
	if create {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return nil, fmt.Errorf("make attachment folder: %w", err)
		}
		flags |= os.O_CREATE
	}
	for {
		f := &folder{path: path}
		lock, err := os.OpenFile(f.file(lockName), flags, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open attachment lock: %w", err)
		}
		f.lock = lock
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		f.corpse = errors.Is(err, unix.EWOULDBLOCK) && f.ownerIsDead()
		if errors.Is(err, unix.EWOULDBLOCK) && !f.corpse {
			f.unlock()
			return nil, fmt.Errorf("lock attachment %s: %w", filepath.Base(path), errAlive)
		}
		if err != nil && !f.corpse {
			f.unlock()
			return nil, fmt.Errorf("lock attachment %s: %w", filepath.Base(path), err)
		}
		if f.current() {
			return f, nil
		}
		f.unlock() // its last owner removed the file between open and lock
	}
}

// current tells whether the locked file is still the one that the path leads to.
func (f *folder) current() bool {
	held, err1 := f.lock.Stat()
	named, err2 := os.Stat(f.file(lockName))
	return err1 == nil && err2 == nil && os.SameFile(held, named)
}

// unlock gives the lock up, unless it is a corpse's. Not by closing alone: a child that is between fork and exec holds
// the descriptor, and so the lock, a moment longer.
func (f *folder) unlock() {
	_ = unix.Flock(int(f.lock.Fd()), unix.LOCK_UN) // if it fails, closing does it
	_ = f.lock.Close()                             // nothing was written
}

// ownerIsDead tells whether the lock is held by a corpse: a killed process one of whose threads
// waits for its own dead server, so that its descriptors, the lock among them, cannot close
// until the connection is aborted.
func (f *folder) ownerIsDead() bool {
	r, err := f.read()
	if err != nil || r.BootID != bootID() {
		return false
	}
	state, tick, err := processState(r.PID)
	if err != nil || tick != r.StartTick {
		return false
	}
	return state == 'Z' || state == 'X' || killPending(r.PID)
}

// read returns the record, and an error that is os.ErrNotExist if there is none.
func (f *folder) read() (record, error) {
	var r record
	file, err := os.Open(f.file(recordName))
	if err != nil {
		return r, fmt.Errorf("open attachment record: %w", err)
	}
	defer func() { _ = file.Close() }() // nothing was written
	b, err := io.ReadAll(io.LimitReader(file, recordMax))
	if err != nil {
		return r, fmt.Errorf("read attachment record: %w", err)
	}
	return decodeRecord(b, f.name())
}

// decodeRecord decodes a record and checks that it belongs to the attachment called name. A program
// older than the record refuses it (ErrInvalid) and touches nothing (H36).
func decodeRecord(b []byte, name string) (record, error) {
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("decode attachment record: %w: %w", err, trivet.ErrCorrupt)
	}
	switch r.Version {
	case 1:
		r.Kind, r.State = KindFUSE, b
	case recordVersion:
	default:
		return r, fmt.Errorf("attachment record: version %d, this program reads 1 to %d: %w",
			r.Version, recordVersion, trivet.ErrInvalid)
	}
	if k, err := ParseKind(string(r.Kind)); err != nil || k == KindAuto || r.Name != name {
		return r, fmt.Errorf("attachment record of %q by %q: in the folder of %q: %w", r.Name, r.Kind, name,
			trivet.ErrCorrupt)
	}
	return r, nil
}

// write replaces the record.
func (f *folder) write(r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode attachment record: %w", err)
	}
	tmp := f.file(recordName + ".tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("write attachment record: %w", err)
	}
	if err := os.Rename(tmp, f.file(recordName)); err != nil {
		return fmt.Errorf("write attachment record: %w", err)
	}
	return nil
}

// remove deletes the folder's files, the folder and the lock with them. It deletes nothing else
// and never a mount: those make it fail.
func (f *folder) remove() error {
	defer f.unlock()
	for _, name := range []string{deviceName, recordName + ".tmp", recordName, lockName, ""} {
		if err := os.Remove(f.file(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove attachment folder: %w", err)
		}
	}
	return nil
}

// bootID names this boot of the machine; "" if the kernel will not say.
func bootID() string {
	b, err := os.ReadFile(bootIDPath)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// processState returns the state letter and start time of a process (proc_pid_stat(5)).
func processState(pid int) (state byte, startTick uint64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("state of process %d: %w", pid, err)
	}
	// The name, in parentheses, may hold anything: fields count from the last ')'.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("state of process %d: %d fields: %w", pid, len(fields), trivet.ErrCorrupt)
	}
	tick, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("state of process %d: %w", pid, err)
	}
	return fields[0][0], tick, nil
}

// killPending tells whether the process has been sent a SIGKILL that it has not died of yet.
func killPending(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		if name != "SigPnd" && name != "ShdPnd" { // of the main thread, of the process
			continue
		}
		mask, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err == nil && mask>>(unix.SIGKILL-1)&1 == 1 {
			return true
		}
	}
	return false
}
