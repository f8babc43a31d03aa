package main

import (
	"fmt"
	"io"
	"math"
)

// figure is one line of the report. NaN is what was not measured.
type figure struct {
	what    string
	value   float64
	against float64 // what it is compared with
	ratio   float64
	digits  int
	wanted  wanted
}

// wanted says what a figure should be.
type wanted struct {
	limit   float64
	least   bool // limit is the least that is wanted, else the most
	ofValue bool // the value is judged although it is compared with something
}

func atMost(x float64) wanted       { return wanted{limit: x} }
func atLeast(x float64) wanted      { return wanted{limit: x, least: true} }
func valueAtMost(x float64) wanted  { return wanted{limit: x, ofValue: true} }
func (w wanted) nothing() bool      { return w == wanted{} }
func (w wanted) met(x float64) bool { return w.least && x >= w.limit || !w.least && x <= w.limit }

func (w wanted) String() string {
	sign := "≤"
	switch {
	case w.nothing():
		return ""
	case w.least:
		sign = "≥"
	}
	return fmt.Sprintf("%s %g", sign, w.limit)
}

// compared is a figure beside another of the same kind; their ratio is judged.
func compared(what string, digits int, value, against float64, w wanted) figure {
	return figure{what: what, value: value, against: against, ratio: value / against, digits: digits, wanted: w}
}

// alone is a figure that is judged by itself.
func alone(what string, digits int, value float64, w wanted) figure {
	return figure{what: what, value: value, against: math.NaN(), ratio: math.NaN(), digits: digits, wanted: w}
}

// judged is the value that is held against what is wanted.
func (f figure) judged() float64 {
	if math.IsNaN(f.against) || f.wanted.ofValue {
		return f.value
	}
	return f.ratio
}

// mark says whether what is wanted is reached.
func (f figure) mark() string {
	switch x := f.judged(); {
	case f.wanted.nothing():
		return ""
	case math.IsNaN(x) || math.IsInf(x, 0):
		return "not measured"
	case f.wanted.met(x):
		return "reached"
	}
	return "MISSED"
}

const (
	headFormat = "%-56s %10s %10s %7s  %-8s %s\n"
	whatWidth  = 56
)

func number(x float64, digits int) string {
	if math.IsNaN(x) || math.IsInf(x, 0) {
		return "-"
	}
	return fmt.Sprintf("%.*f", digits, x)
}

// print writes a heading and figures.
func printFigures(w io.Writer, title, against string, fs []figure) {
	fmt.Fprintf(w, "\n"+headFormat, title, "measured", against, "ratio", "wanted", "")
	for _, f := range fs {
		pad := ""
		for range whatWidth - len([]rune(f.what)) { // %-56s counts bytes of µ
			pad += " "
		}
		fmt.Fprintf(w, "%s%s %10s %10s %7s  %-8s %s\n", f.what, pad, number(f.value, f.digits),
			number(f.against, f.digits), number(f.ratio, 2), f.wanted, f.mark())
	}
}
