// Package smoke_test proves on a real Kubernetes that a PersistentVolumeClaim becomes a volume that
// outlives its pod, its node's driver and its leader. It applies the manifests in deploy/ as they stand
// and removes everything again; what is left over is a failure.
//
// It needs root, the binaries of build.sh and the image of `make image`: run it by `make e2e-smoke`.
package smoke_test

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/e2e/lab"
)

var (
	dirFlag  = flag.String("lab.dir", lab.DefaultDir, "folder of the lab")
	keepFlag = flag.Bool("lab.keep", false, "leave the lab up when a test fails, to look at it")
)

// Where things stand, seen from this folder.
const (
	e2eFolder   = ".."
	deploy      = "../../deploy"
	trivetImage = "../../bin/trivet-image.tar"
)

// namespace is that of deploy/namespace.yaml.
const namespace = "trivet-system"

// waitMax bounds every wait for the cluster to do something by itself. No test asserts on how long it
// takes.
const (
	waitMax   = 3 * time.Minute
	pollEvery = 250 * time.Millisecond
)

func TestMain(m *testing.M) {
	lab.Hook()
	os.Exit(m.Run())
}

// suite is a lab with Trivet on it.
type suite struct {
	*lab.Cluster
	t *testing.T
}

// start brings the lab up, with the image in it. The lab goes down when the test ends.
func start(t *testing.T) *suite {
	t.Helper()
	return startWith(t, func(*lab.Config) {})
}

// startWith is start of a lab that is to be otherwise.
func startWith(t *testing.T, change func(*lab.Config)) *suite {
	t.Helper()
	if testing.Short() {
		t.Skip("needs root and built binaries: make e2e-smoke")
	}
	if _, err := os.Stat(trivetImage); err != nil {
		t.Fatalf("%v; run `make e2e-smoke`, which makes the image", err)
	}
	cache, err := lab.FindCache(t.Context(), e2eFolder)
	require.NoError(t, err)
	cfg := lab.Config{Dir: *dirFlag, Cache: cache, Log: slog.New(slog.NewTextHandler(logWriter{t}, nil))}
	change(&cfg)
	c, err := lab.Up(t.Context(), cfg)
	require.NoError(t, err)
	s := &suite{Cluster: c, t: t}
	t.Cleanup(s.end)
	image, err := filepath.Abs(trivetImage)
	require.NoError(t, err)
	require.NoError(t, c.LoadImage(t.Context(), image))
	requireRoom(t, *dirFlag)
	return s
}

// requireRoom fails when the nodes would have no room for volumes: pods would wait for capacity that nobody has.
func requireRoom(t *testing.T, dir string) {
	t.Helper()
	var fs syscall.Statfs_t
	require.NoError(t, syscall.Statfs(dir, &fs))
	free, total := int64(fs.Bavail)*fs.Bsize, int64(fs.Blocks)*fs.Bsize
	const room = 4 << 30 // for what the steps write, on all nodes
	keeps := max(total/20, 2<<30)
	require.GreaterOrEqual(t, free, keeps+room, "%d MiB of %d are free in %s; Trivet keeps %d of them free (5 %%), and the "+
		"test needs %d more: remove something, or name another folder with -lab.dir", free>>20, total>>20, dir, keeps>>20,
		int64(room)>>20)
}

// end takes the lab down, which proves that nothing is left.
func (s *suite) end() {
	if s.t.Failed() {
		s.explain()
		if *keepFlag {
			s.t.Logf("the lab is left up: export KUBECONFIG=%s", s.Kubeconfig())
			return
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), waitMax)
	defer cancel()
	assert.NoError(s.t, s.Down(ctx))
}

// explain prints what a person would look at first, and last, where it is not cut off, what says most.
func (s *suite) explain() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, x := range []struct {
		lines int // of the end
		args  []string
	}{
		{400, []string{
			"logs", "-n", namespace, "-l", "app.kubernetes.io/name=trivet", "--all-containers", "--tail=40", "--prefix",
			"--max-log-requests=40",
		}},
		{20, []string{"get", "csinodes", "-o", "jsonpath={range .items[*]}{.metadata.name}: {.spec.drivers}{\"\\n\"}{end}"}},
		{20, []string{"get", "csistoragecapacities,leases", "-A"}},
		{20, []string{"get", "pods,pvc,pv,volumeattachments", "-A", "-o", "wide"}},
		{20, []string{"get", "events", "-A", "--sort-by=.lastTimestamp"}},
	} {
		out, err := s.Kubectl(ctx, x.args...)
		lines := strings.Split(strings.TrimSpace(out), "\n")
		s.t.Logf("kubectl %s: %v\n%s", strings.Join(x.args, " "), err,
			strings.Join(lines[max(0, len(lines)-x.lines):], "\n"))
	}
}

// step runs one part of the story; the story ends when it fails.
func (s *suite) step(name string, run func(s *suite)) {
	s.t.Helper()
	began := time.Now()
	ok := s.t.Run(name, func(t *testing.T) { run(&suite{Cluster: s.Cluster, t: t}) })
	if !ok {
		s.t.FailNow()
	}
	s.t.Logf("%s: %.1f s", name, time.Since(began).Seconds())
}

// kubectl runs kubectl, which must succeed, and returns what it printed.
func (s *suite) kubectl(args ...string) string {
	s.t.Helper()
	out, err := s.Kubectl(s.t.Context(), args...)
	require.NoError(s.t, err, "kubectl %s", strings.Join(args, " "))
	return strings.TrimSpace(out)
}

// apply applies a manifest given as text.
func (s *suite) apply(manifest string) {
	s.t.Helper()
	_, err := s.KubectlInput(s.t.Context(), manifest, "apply", "-f", "-")
	require.NoError(s.t, err, "%s", manifest)
}

// await waits until check returns nil and fails with its last error otherwise.
func (s *suite) await(what string, check func() error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), waitMax)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			require.FailNow(s.t, what+": not within "+waitMax.String(), "%v", err)
		case <-time.After(pollEvery):
		}
	}
}

// get returns a field of an object by JSONPath; "" when there is no such object.
func (s *suite) get(kind, name, path string) string {
	s.t.Helper()
	return s.kubectl("get", kind, name, "--ignore-not-found", "-o", "jsonpath="+path)
}

// awaitGone waits until an object does not exist.
func (s *suite) awaitGone(kind, name string) {
	s.t.Helper()
	s.await(kind+" "+name+" gone", func() error {
		if out := s.kubectl("get", kind, name, "--ignore-not-found", "-o", "name"); out != "" {
			return fmt.Errorf("%s is still there", out)
		}
		return nil
	})
}

// inPod runs a command in a pod and returns what it printed.
func (s *suite) inPod(pod string, argv ...string) string {
	s.t.Helper()
	return s.kubectl(append([]string{"exec", pod, "--"}, argv...)...)
}

// trivet runs the CLI where deploy/README.md says: in the controller's pod.
func (s *suite) trivet(args ...string) (string, error) {
	return s.Kubectl(s.t.Context(), append([]string{
		"exec", "-n", namespace, "deploy/trivet-controller", "-c", "csi-controller", "--", "trivet",
	}, args...)...)
}

// ask runs the CLI with JSON output and decodes its answer.
func (s *suite) ask(into any, args ...string) error {
	out, err := s.trivet(append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), into)
}

// logWriter writes the lab's log to the test's.
type logWriter struct{ t *testing.T }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}
