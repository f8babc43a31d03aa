package main

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// clockTick is the unit of utime and stime in /proc/PID/stat: USER_HZ, 100 on every Linux architecture that Go knows.
const clockTick = time.Second / 100

// use is what a process has used since it began.
type use struct {
	cpu      time.Duration // user and system
	writtenB int64         // handed to the block layer, or to the page cache if it goes that way
	rssB     int64         // resident now
}

func (u use) minus(v use) use { return use{u.cpu - v.cpu, u.writtenB - v.writtenB, u.rssB} }

// readUse reads the use of a process (proc_pid_stat(5), proc_pid_io(5), proc_pid_status(5)).
func readUse(pid int) (use, error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	b, err := os.ReadFile(dir + "stat")
	if err != nil {
		return use{}, err
	}
	// The name, in brackets, may hold anything; utime and stime are fields 14 and 15.
	_, after, _ := strings.Cut(string(b[strings.LastIndexByte(string(b), ')'):]), " ")
	fields := strings.Fields(after)
	if len(fields) < 13 {
		return use{}, fmt.Errorf("%sstat: %d fields after the name", dir, len(fields))
	}
	utime, err := strconv.ParseInt(fields[11], 10, 64)
	if err != nil {
		return use{}, err
	}
	stime, err := strconv.ParseInt(fields[12], 10, 64)
	if err != nil {
		return use{}, err
	}
	u := use{cpu: time.Duration(utime+stime) * clockTick}
	if u.writtenB, err = field(dir+"io", "write_bytes:"); err != nil {
		return use{}, err
	}
	rssKB, err := field(dir+"status", "VmRSS:")
	u.rssB = rssKB << 10
	return u, err
}

// field returns the number behind a key in a file of lines.
func field(path, key string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close() //nolint:errcheck // only read
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), key); ok {
			return strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s: no %s", path, key)
}

// process is a process of a system, by the name that the report gives it.
type process struct {
	name string
	pid  int
}

func readUses(ps []process) ([]use, error) {
	uses := make([]use, len(ps))
	for i, p := range ps {
		u, err := readUse(p.pid)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
		uses[i] = u
	}
	return uses, nil
}
