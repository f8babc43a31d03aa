package conformance_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/e2e/conformance"
)

func spec(state, pattern, leaf, failure string) string {
	s := `{"ContainerHierarchyTexts":["External Storage [Driver: csi.trivet.dev]","` + pattern +
		`"],"LeafNodeType":"It","LeafNodeText":"` + leaf + `","State":"` + state + `","RunTime":1500000000`
	if failure != "" {
		s += `,"Failure":{"Message":"` + failure + `"}`
	}
	return s + "}"
}

func read(t *testing.T, specs string) ([]conformance.Spec, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "report.json")
	require.NoError(t, os.WriteFile(path, []byte(`[{"SpecReports":[`+specs+`]}]`), 0o600))
	return conformance.Read(path)
}

const (
	dynamic   = "[Testpattern: Dynamic PV (xfs)][Slow] volumes"
	ephemeral = "[Testpattern: Generic Ephemeral-volume (default fs) [Feature:X]] ephemeral"
)

func TestPage(t *testing.T) {
	t.Parallel()
	setup := `{"LeafNodeType":"SynchronizedBeforeSuite","State":"passed"}`
	other := `{"ContainerHierarchyTexts":["[sig-node] Pods"],"LeafNodeType":"It","State":"passed"}`
	specs, err := read(t, setup+","+other+","+
		spec("passed", dynamic, "should store data", "")+","+
		spec("skipped", dynamic, "left out by the focus", "")+","+
		spec("skipped", ephemeral, "should grow", `no inline volumes\n  at x.go:1`)+","+
		spec("timedout", ephemeral, "should end", `error running /a/b-1/kubectl --config=/c/d https://h:1/x/y in /`))
	require.NoError(t, err)
	assert.Equal(t, []conformance.Spec{
		{Suite: "volumes", Name: "Dynamic PV (xfs): should store data", State: "passed", Seconds: 1.5},
		{
			Suite: "ephemeral", Name: "Generic Ephemeral-volume (default fs) [Feature:X]: should grow", State: "skipped",
			Reason: "no inline volumes", Seconds: 1.5,
		},
		{
			Suite: "ephemeral", Name: "Generic Ephemeral-volume (default fs) [Feature:X]: should end", State: "timedout",
			Reason: "error running kubectl --config=d https://h:1/x/y in /", Seconds: 1.5,
		},
	}, specs)
	require.Equal(t, specs[2:], conformance.Failed(specs))

	p := conformance.Pass{Name: "parallel", Specs: specs, Seconds: 61}
	page := filepath.Join(t.TempDir(), "page.md")
	require.NoError(t, conformance.Write(page, []conformance.Pass{p}, conformance.Left{Why: "No SSH.", Specs: specs[:1]}))
	text, err := os.ReadFile(page)
	require.NoError(t, err)
	for _, want := range []string{
		"- parallel: 3 specs: 1 passed, 1 skipped, 1 failed; 61 s\n",
		"| ephemeral | 0 | 1 | 1 |\n| volumes | 1 | 0 | 0 |\n| **all** | **1** | **1** | **1** |\n",
		"## Skipped by rules of their own\n\nno inline volumes\n\n- ephemeral: Generic",
		"## Failed\n\nerror running kubectl --config=d https://h:1/x/y in /\n\n- ephemeral: Generic",
		"## Not run\n\nNo SSH.\n\n- volumes: Dynamic PV (xfs): should store data\n",
	} {
		assert.Contains(t, string(text), want)
	}
}

func TestReadFails(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ specs, want string }{
		"nothing ran":  {spec("skipped", dynamic, "left out", ""), "no spec"},
		"set-up fails": {`{"LeafNodeType":"BeforeSuite","State":"failed","Failure":{"Message":"no nodes"}}`, "BeforeSuite: failed: no nodes"},
		"no report":    {`{`, "not a report"},
	} {
		_, err := read(t, tt.specs)
		require.ErrorContains(t, err, tt.want, name)
	}
}
