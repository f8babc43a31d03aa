package smoke_test

import (
	"bufio"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/e2e/conformance"
	"github.com/trivet-csi/trivet/e2e/lab"
)

const (
	conformancePage = "../../docs/conformance.md"
	driverFile      = "testdata/driver.yaml"
	limitedFolder   = "testdata/limited"

	// Classes that do not wait for a pod. Most specs use that of xfs, which grows in use here.
	xfsImmediate  = "xfs-immediate"
	ext4Immediate = "ext4-immediate"

	// notHere are the specs that cannot run on the nodes of this cluster. Of those with SELinux, some look at nothing of it.
	notHere = noSELinux + `|\[Feature:snapshotmetadata\]`

	noSELinux = `\] seLinuxMount |different SELinux context`

	// disruptive are the specs that stop kubelets: nothing else can run beside them.
	disruptive = `\[Disruptive\]`

	// Most of the time of a spec is waiting for a kubelet.
	upstreamProcesses = "6"
	upstreamTimeout   = 90 * time.Minute
)

var (
	focusFlag = flag.String("upstream.focus", "", "regular expression of the only specs to run; the page is left as it is")
	procsFlag = flag.String("upstream.procs", upstreamProcesses,
		"how many specs of upstream.focus run at a time; 1 for those that stop kubelets")
)

// TestUpstream runs Kubernetes' own suite of external storage drivers, External.Storage, and writes what became of
// each spec to docs/conformance.md: `make e2e-upstream`.
func TestUpstream(t *testing.T) {
	s := startWith(t, func(c *lab.Config) { c.SSH = true })
	u := upstream{suite: s, reports: filepath.Join(s.Dir(), "logs", "upstream")}
	s.step("install with all sidecars", func(s *suite) { installFrom(s, limitedFolder) })
	s.step("load upstream's images", loadUpstreamImages)
	for class, fsType := range map[string]string{xfsImmediate: "xfs", ext4Immediate: "ext4"} {
		s.growingClass(class, fsType, "Immediate")
	}
	require.NoError(t, os.MkdirAll(u.reports, 0o755))

	if *focusFlag != "" {
		p := u.run("some", driverFile, "--focus=External.Storage.*"+*focusFlag, "--skip="+notHere, "--procs="+*procsFlag)
		u.require(p)
		return
	}
	parallel := "--procs=" + upstreamProcesses
	passes := []conformance.Pass{
		u.run("parallel", driverFile, "--focus=External.Storage", `--skip=\[Serial\]|\] (capacity|volumegroup)|`+disruptive+"|"+notHere, parallel),
		u.run("serial", driverOf(t, ext4Immediate, false), `--focus=External.Storage.*\[Serial\]`, "--skip="+notHere),
		u.run("disruptive", driverFile, "--focus=External.Storage.*"+disruptive, "--skip="+notHere),
		// There is capacity of classes that wait for a pod only.
		u.run("capacity", driverOf(t, xfsClass, false), `--focus=External.Storage.*\] capacity`, "--skip="+notHere),
		u.run("topology", driverOf(t, xfsClass, true), "--focus=External.Storage.*"+lateTopology, "--skip="+notHere,
			parallel),
		// These, and one of the serial ones, restore claims of 1 MiB, for which an xfs is too large.
		u.run("small", driverOf(t, ext4Immediate, false), `--focus=External.Storage.*\] volumegroup`, `--skip=\[Serial\]|`+notHere,
			parallel),
	}
	left := func(driver, specs, why string, flags ...string) conformance.Left {
		p := u.run("left", driver, append(flags, "--focus=External.Storage.*"+specs, "--dry-run")...)
		return conformance.Left{Why: why, Specs: p.Specs}
	}
	require.NoError(t, conformance.Write(conformancePage, passes,
		left(driverOf(t, xfsClass, true), `immediate binding\)\] topology`, "These want volumes that some nodes cannot attach; "+
			"every node can attach every volume of Trivet."),
		left(driverFile, "("+noSELinux+")", "These need a kernel with SELinux."),
		left(driverFile, `\[Feature:snapshotmetadata\]`, "The pod of these builds a program from a branch of a repository, and this "+
			"cluster reaches no network. Tests of driver/ and server/ look at the allocated and changed blocks of snapshots."),
	))
	for _, p := range passes {
		u.require(p)
	}
	s.step("nothing is left", nothingIsLeft)
}

// loadUpstreamImages gives the nodes images of the names that the suite wants, made here: Ginkgo's pods find in them
// what the real ones have, as far as specs of storage use it.
func loadUpstreamImages(s *suite) {
	programs, err := lab.FindUpstream(s.t.Context(), e2eFolder)
	require.NoError(s.t, err)
	populator, err := lab.FindPopulator(s.t.Context(), e2eFolder)
	require.NoError(s.t, err)
	require.NoError(s.t, s.LoadUpstreamImages(s.t.Context(), programs, populator))
}

// lateTopology are the specs of a class that waits for a pod and has allowedTopologies.
const lateTopology = `delayed binding\)\] topology`

// driverOf writes driver.yaml for another class. With topology it has a topology key; were there one in every pass, the
// suite would leave out the specs that move a volume to another node.
func driverOf(t *testing.T, class string, topology bool) string {
	t.Helper()
	b, err := os.ReadFile(driverFile)
	require.NoError(t, err)
	changes := [][2]string{{xfsImmediate, class}}
	if topology {
		changes = append(changes, [2]string{
			"  Capabilities:\n",
			"  TopologyKeys: [topology.csi.trivet.dev/node]\n  NumAllowedTopologies: 1\n  Capabilities:\n    topology: true\n",
		})
	}
	text := string(b)
	for _, change := range changes {
		require.Contains(t, text, change[0])
		text = strings.Replace(text, change[0], change[1], 1)
	}
	path := filepath.Join(t.TempDir(), "driver.yaml")
	require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
	return path
}

// upstream runs passes of the suite.
type upstream struct {
	*suite
	reports string // folder of their reports and logs
}

// run runs one pass with Ginkgo's flags and returns what became of its specs, whether or not they passed.
func (u *upstream) run(name, driver string, flags ...string) conformance.Pass {
	u.t.Helper()
	began := time.Now()
	programs, err := lab.FindUpstream(u.t.Context(), e2eFolder)
	require.NoError(u.t, err)
	driver, err = filepath.Abs(driver)
	require.NoError(u.t, err)
	argv := append(flags, "--no-color", "--timeout="+upstreamTimeout.String(), "--output-dir="+u.reports,
		"--json-report="+name+".json", "--output-interceptor-mode=none", filepath.Join(programs, "upstream.test"), "--",
		"-kubeconfig="+u.Kubeconfig(), "-provider=local", "-storage.testdriver="+driver, "-report-dir="+u.reports)
	cmd := exec.CommandContext(u.t.Context(), filepath.Join(programs, "ginkgo"), argv...)
	cmd.Env = append(os.Environ(), "PATH="+u.ProgramsDir()+":"+os.Getenv("PATH"),
		"KUBE_SSH_USER=root", "LOCAL_SSH_KEY="+u.SSHKey())
	cmd.Dir = u.reports
	// Ginkgo's workers are not killed with it, but end when it is asked to.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	log, err := os.Create(filepath.Join(u.reports, name+".log"))
	require.NoError(u.t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Run(); err != nil {
		u.t.Logf("pass %s: %v", name, err) // its report says what failed
	}
	specs, err := conformance.Read(filepath.Join(u.reports, name+".json"))
	if err != nil {
		require.FailNow(u.t, "pass "+name, "%v\n%s", err, lastLines(log.Name(), 30))
	}
	p := conformance.Pass{Name: name, Specs: specs, Seconds: time.Since(began).Seconds()}
	u.t.Logf("pass %s: %s", name, p.Summary())
	return p
}

// require fails the test for every spec that failed.
func (u *upstream) require(p conformance.Pass) {
	u.t.Helper()
	for _, spec := range conformance.Failed(p.Specs) {
		assert.Fail(u.t, p.Name+": "+spec.Suite+": "+spec.Name, "%s: %s", spec.State, spec.Reason)
	}
}

// lastLines returns the last n lines of a file.
func lastLines(path string, n int) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	var lines []string
	for in := bufio.NewScanner(f); in.Scan(); {
		lines = append(lines, in.Text())
		if len(lines) > n {
			lines = lines[1:]
		}
	}
	return fmt.Sprintf("%s:\n%s", path, strings.Join(lines, "\n"))
}
