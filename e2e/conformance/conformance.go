// Package conformance reads what Ginkgo reports of runs of Kubernetes' own suite of external storage drivers and
// writes the page that shows it, docs/conformance.md.
package conformance

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
)

// suitesName is the node of Ginkgo's tree below which the specs of a driver are.
const suitesName = "External Storage"

// State is what became of a spec in a run, in Ginkgo's words.
type State string

// The states that a spec that was to run may have; every other one is a failure.
const (
	Passed  State = "passed"
	Skipped State = "skipped"
)

// Spec is one spec of the suite and what became of it.
type Spec struct {
	Suite   string // such as volume-expand
	Name    string // all texts below the suite, as Ginkgo joins them
	State   State
	Reason  string // why it was skipped, or how it failed: the first line
	Seconds float64
}

// Pass is one run of a part of the suite.
type Pass struct {
	Name    string
	Specs   []Spec
	Seconds float64
}

// Summary is a line for logs and the page.
func (p Pass) Summary() string {
	n := map[State]int{}
	for _, s := range p.Specs {
		n[s.State]++
	}
	return fmt.Sprintf("%d specs: %d passed, %d skipped, %d failed; %.0f s",
		len(p.Specs), n[Passed], n[Skipped], len(Failed(p.Specs)), p.Seconds)
}

// report is the part of a file of `ginkgo --json-report` that is read: a list of these.
type report struct {
	SpecReports []struct {
		ContainerHierarchyTexts []string
		LeafNodeType            string
		LeafNodeText            string
		State                   State
		RunTime                 int64 // nanoseconds
		Failure                 *struct{ Message string }
	}
}

// Read returns the specs of a report that were to run. Those that the run left out by its focus are not among them:
// Ginkgo calls them skipped, without a reason. It fails when the report has no spec of a driver at all, and when the
// suite itself failed, before or after its specs.
func Read(path string) ([]Spec, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var reports []report
	if err := json.Unmarshal(text, &reports); err != nil {
		return nil, fmt.Errorf("%s: not a report of Ginkgo: %w", path, err)
	}
	var specs []Spec
	for _, r := range reports {
		for _, s := range r.SpecReports {
			reason := ""
			if s.Failure != nil {
				reason = firstLine(s.Failure.Message)
			}
			if s.LeafNodeType != "It" {
				if s.State != Passed && s.State != Skipped {
					return nil, fmt.Errorf("%s: %s: %s: %s", path, s.LeafNodeType, s.State, reason)
				}
				continue
			}
			if s.State == Skipped && reason == "" || len(s.ContainerHierarchyTexts) == 0 ||
				!strings.HasPrefix(s.ContainerHierarchyTexts[0], suitesName) {
				continue
			}
			specs = append(specs, Spec{
				Suite: suiteOf(s.ContainerHierarchyTexts), Name: nameOf(s.ContainerHierarchyTexts, s.LeafNodeText),
				State: s.State, Reason: reason, Seconds: float64(s.RunTime) / 1e9,
			})
		}
	}
	if len(specs) == 0 {
		return nil, fmt.Errorf("%s: no spec of %q ran", path, suitesName)
	}
	return specs, nil
}

// paths are absolute ones of the machine on which the suite ran.
var paths = regexp.MustCompile(`(^|\s|=)(?:/[\w.@+-]+)+/([\w.@+-]+)`)

// firstLine returns the first line of a text, with names of files in place of their paths.
func firstLine(text string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	return paths.ReplaceAllString(strings.TrimSpace(line), "$1$2")
}

// pattern is the node between the driver and the specs: "[Testpattern: Dynamic PV (xfs)] volume-expand", with labels.
var pattern = regexp.MustCompile(`^\[Testpattern: (.*?)\]((?:\s*\[[^\]]*\])*)\s+([[:alpha:]]\S*)`)

func suiteOf(texts []string) string {
	for _, t := range texts {
		if m := pattern.FindStringSubmatch(t); m != nil {
			return m[3]
		}
	}
	return "other"
}

func nameOf(texts []string, leaf string) string {
	var parts []string
	for _, t := range append(slices.Clone(texts[1:]), leaf) {
		if m := pattern.FindStringSubmatch(t); m != nil {
			t = m[1] + ":"
		}
		parts = append(parts, t)
	}
	return strings.Join(parts, " ")
}

// Failed returns the specs that neither passed nor were skipped by a rule of their own.
func Failed(specs []Spec) []Spec {
	return slices.DeleteFunc(slices.Clone(specs), func(s Spec) bool { return s.State == Passed || s.State == Skipped })
}

const intro = `# Conformance

What Kubernetes' own suite of external storage drivers says of Trivet: all specs of External.Storage of Kubernetes' end
to end tests, on a real cluster of three nodes with the manifests of deploy/full ([e2e/](../e2e/README.md)). This page
is written by ` + "`make e2e-upstream`" + `; what the suite is told of Trivet is in
[driver.yaml](../e2e/smoke/testdata/driver.yaml). csi-sanity is another suite: ` + "`make sanity`" + `.

`

// Left are specs that were in no pass.
type Left struct {
	Why   string
	Specs []Spec
}

// Write writes the page: what became of the specs of all passes, and the names of those that were in none.
func Write(path string, passes []Pass, left ...Left) error {
	var b strings.Builder
	b.WriteString(intro)
	var all []Spec
	for _, p := range passes {
		fmt.Fprintf(&b, "- %s: %s\n", p.Name, p.Summary())
		all = append(all, p.Specs...)
	}
	b.WriteString("\n")
	b.WriteString(Tables(all))
	if len(left) > 0 {
		b.WriteString("\n## Not run\n")
	}
	for _, l := range left {
		fmt.Fprintf(&b, "\n%s\n\n", l.Why)
		for _, s := range l.Specs {
			fmt.Fprintf(&b, "- %s: %s\n", s.Suite, s.Name)
		}
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}

// Tables returns, as Markdown, the specs by suite, and by reason those that were skipped or failed.
func Tables(specs []Spec) string {
	type count struct{ passed, skipped, failed int }
	suites := map[string]count{}
	var all count
	for _, s := range specs {
		c := suites[s.Suite]
		switch s.State {
		case Passed:
			c.passed++
			all.passed++
		case Skipped:
			c.skipped++
			all.skipped++
		default:
			c.failed++
			all.failed++
		}
		suites[s.Suite] = c
	}
	var b strings.Builder
	b.WriteString("| suite | passed | skipped | failed |\n|---|---|---|---|\n")
	for _, name := range slices.Sorted(maps.Keys(suites)) {
		c := suites[name]
		fmt.Fprintf(&b, "| %s | %d | %d | %d |\n", name, c.passed, c.skipped, c.failed)
	}
	fmt.Fprintf(&b, "| **all** | **%d** | **%d** | **%d** |\n", all.passed, all.skipped, all.failed)
	writeReasons(&b, "Skipped by rules of their own", specs, func(s Spec) bool { return s.State == Skipped })
	writeReasons(&b, "Failed", specs, func(s Spec) bool { return s.State != Passed && s.State != Skipped })
	return b.String()
}

// writeReasons lists the specs of a kind below the reason that they share.
func writeReasons(b *strings.Builder, title string, specs []Spec, is func(Spec) bool) {
	byReason := map[string][]string{}
	for _, s := range specs {
		if is(s) {
			byReason[s.Reason] = append(byReason[s.Reason], s.Suite+": "+s.Name)
		}
	}
	if len(byReason) == 0 {
		return
	}
	fmt.Fprintf(b, "\n## %s\n", title)
	reasons := slices.SortedFunc(maps.Keys(byReason), func(x, y string) int {
		return cmp.Or(cmp.Compare(len(byReason[y]), len(byReason[x])), strings.Compare(x, y))
	})
	for _, reason := range reasons {
		fmt.Fprintf(b, "\n%s\n\n", reason)
		names := byReason[reason]
		slices.Sort(names)
		for _, name := range names {
			fmt.Fprintf(b, "- %s\n", name)
		}
	}
}
