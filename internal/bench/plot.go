package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// Measures of the plot, in its own units.
const (
	plotWidth   = 860
	plotLabel   = 210 // left of the bars
	plotBar     = 12
	plotGap     = 14 // between jobs
	plotRatio   = 1.25
	plotPerOne  = (plotWidth - plotLabel - 60) / plotRatio
	plotHeading = 26
)

// colours tell systems apart, the colour-blind included (Okabe and Ito).
var colours = []string{"#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442", "#999999"}

// plot draws the ratios as horizontal bars, job by job, as an SVG. Bars longer than plotRatio are cut.
func (r *report) plot() string {
	var b strings.Builder
	y := plotHeading
	systems := r.measured()
	for _, j := range jobs {
		fmt.Fprintf(&b, `<text x="4" y="%d" font-weight="bold">%s, %s, to %s</text>`+"\n",
			y, j.id, html.EscapeString(j.what), html.EscapeString(j.base))
		y += 6
		for i, s := range systems {
			ratio := r.ratio(s.name, &j)
			if s.name == nameRaw || s.name == nameRaw3x || math.IsNaN(ratio) {
				continue
			}
			fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`,
				plotLabel-6, y+plotBar-2, html.EscapeString(s.name))
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`,
				plotLabel, y, min(ratio, plotRatio)*plotPerOne, plotBar-2, colours[i%len(colours)])
			fmt.Fprintf(&b, `<text x="%.1f" y="%d">%.2f</text>`+"\n",
				plotLabel+4+min(ratio, plotRatio)*plotPerOne, y+plotBar-2, ratio)
			y += plotBar
		}
		y += plotGap + plotBar
	}
	one := plotLabel + plotPerOne
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" `+
		`font-family="sans-serif" font-size="10">`+"\n"+
		`<rect width="100%%" height="100%%" fill="white"/>`+"\n"+
		`<line x1="%.1f" y1="0" x2="%.1f" y2="%d" stroke="#888" stroke-dasharray="3 3"/>`+"\n"+
		`%s</svg>`+"\n", plotWidth, y, one, one, y, b.String())
}
