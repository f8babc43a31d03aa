package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// progress is a bar on a terminal, and a line for each step elsewhere.
type progress struct {
	out      *os.File
	terminal bool
	total, n int
	began    time.Time
}

func newProgress(out *os.File, total int) *progress {
	info, err := out.Stat()
	return &progress{
		out: out, terminal: err == nil && info.Mode()&os.ModeCharDevice != 0, total: total, began: time.Now(),
	}
}

// step says what is done next.
func (p *progress) step(what string) {
	p.draw(p.out, what)
	p.n++
}

func (p *progress) end() {
	p.draw(p.out, "done")
	if p.terminal {
		fmt.Fprintln(p.out)
	}
}

func (p *progress) draw(w io.Writer, what string) {
	const width = 30
	full := width * p.n / max(p.total, 1)
	line := fmt.Sprintf("[%s%s] %d/%d %s", strings.Repeat("#", full), strings.Repeat(".", width-full), p.n, p.total, what)
	if p.n > 0 && p.n < p.total {
		left := time.Since(p.began) / time.Duration(p.n) * time.Duration(p.total-p.n)
		line += fmt.Sprintf(", about %s left", left.Round(time.Second))
	}
	if p.terminal {
		fmt.Fprintf(w, "\r\x1b[K%s", line)
		return
	}
	fmt.Fprintln(w, line)
}
