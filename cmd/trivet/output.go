package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

const (
	outputTable = "table"
	outputJSON  = "json"
)

// table is what a command prints: columns for people.
type table struct {
	header []string
	rows   [][]string
}

// show prints v as JSON or t as a table, as the user chose.
func (o *options) show(w io.Writer, v any, t table) error {
	if o.output == outputJSON {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	if len(t.header) > 0 {
		fmt.Fprintln(tw, strings.Join(t.header, "\t"))
	}
	for _, row := range t.rows {
		for i, cell := range row {
			if cell == "" {
				row[i] = "-"
			}
		}
		fmt.Fprintln(tw, strings.Join(row, "\t"))
	}
	return tw.Flush()
}

// sizeText prints bytes in binary units: exactly when it can, else with one decimal.
func sizeText(n int64) string {
	const units = "KMGTP"
	v, unit := float64(n), ""
	for i := 0; i < len(units) && v >= 1024; i++ {
		v /= 1024
		unit = units[i:i+1] + "i"
	}
	if v == float64(int64(v)) {
		return fmt.Sprintf("%d%s", int64(v), unit)
	}
	return fmt.Sprintf("%.1f%s", v, unit)
}

// parseSize reads a size in bytes: a whole number, alone or with a binary (Ki, Mi, Gi, Ti) or
// decimal (k, M, G, T) unit, as Kubernetes writes quantities.
func parseSize(s string) (int64, error) {
	units := []struct {
		suffix string
		factor int64
	}{
		{"Ki", 1 << 10},
		{"Mi", 1 << 20},
		{"Gi", 1 << 30},
		{"Ti", 1 << 40},
		{"k", 1e3},
		{"M", 1e6},
		{"G", 1e9},
		{"T", 1e12},
	}
	number, factor := s, int64(1)
	for _, u := range units {
		if rest, ok := strings.CutSuffix(s, u.suffix); ok {
			number, factor = rest, u.factor
			break
		}
	}
	var n int64
	for _, r := range number {
		if r < '0' || r > '9' || n > (1<<62)/10 {
			return 0, usageError{fmt.Errorf("size %q: want a whole number, or one with Ki, Mi, Gi or Ti", s)}
		}
		n = n*10 + int64(r-'0')
	}
	if number == "" || n == 0 || n > (1<<62)/factor {
		return 0, usageError{fmt.Errorf("size %q: want more than zero and less than 4 EiB", s)}
	}
	return n * factor, nil
}
