package blockdev_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/node/blockdev"
)

// helperEnv makes the test binary attach instead of testing: its value is the run dir.
const helperEnv = "TRIVET_TEST_ATTACH_HELPER"

func TestMain(m *testing.M) {
	if runDir := os.Getenv(helperEnv); runDir != "" {
		fmt.Println("failed:", attachHelper(runDir)) //nolint:forbidigo // the parent reads it
		os.Exit(1)
	}
	if cfg := os.Getenv(survivorEnv); cfg != "" {
		fmt.Println("failed:", runSurvivor(cfg)) //nolint:forbidigo // the parent reads it
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// attachHelper attaches a device, prints its path and serves it until it is killed. Told so by a
// line on its input, it flushes the device, by Detach or by fsync(2), and lets the flush hang.
func attachHelper(runDir string) error {
	dev := faultdev.Wrap(faultdev.NewMem(64 << 20))
	ctx := context.Background()
	a, err := blockdev.Attach(ctx, blockdev.Config{Name: "vol-dead", RunDir: runDir, Device: dev})
	if err != nil {
		return err
	}
	fmt.Println("attached:", a.Path()) //nolint:forbidigo // the parent reads it
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil {
		return err
	}
	gate := dev.Hold(faultdev.OfKind(faultdev.Flush))
	go func() {
		<-gate.Arrived()
		fmt.Println("flushing:", a.Path()) //nolint:forbidigo // the parent reads it
	}()
	if line == "detach\n" {
		return a.Detach(ctx)
	}
	f, err := os.OpenFile(a.Path(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Sync()
}

// helper is a running helper process.
type helper struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	lines  *bufio.Scanner
	device string
	runDir string
}

func startHelper(t *testing.T) *helper {
	t.Helper()
	needKernel(t)
	h := &helper{runDir: t.TempDir()}
	exe, err := os.Executable()
	require.NoError(t, err)
	h.cmd = exec.Command(exe)
	h.cmd.Env = append(os.Environ(), helperEnv+"="+h.runDir)
	out, err := h.cmd.StdoutPipe()
	require.NoError(t, err)
	h.in, err = h.cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, h.cmd.Start())
	t.Cleanup(func() {
		_ = h.cmd.Process.Kill()
		_, err := blockdev.Cleanup(context.WithoutCancel(t.Context()), h.runDir, nil)
		require.NoError(t, err)
		requireNothingLeft(t, h.runDir)
		_ = h.in.Close()
		_ = h.cmd.Wait()
	})
	h.lines = bufio.NewScanner(out)
	h.device = h.expect(t, "attached: ")
	return h
}

// expect reads a line that begins so and returns the rest.
func (h *helper) expect(t *testing.T, prefix string) string {
	t.Helper()
	require.True(t, h.lines.Scan(), "the helper said nothing")
	rest, ok := strings.CutPrefix(h.lines.Text(), prefix)
	require.True(t, ok, "helper: %s", h.lines.Text())
	return rest
}

func (h *helper) kill(t *testing.T) {
	t.Helper()
	require.NoError(t, h.cmd.Process.Kill())
	require.Error(t, h.cmd.Wait())
}

func TestCleanupAfterKill(t *testing.T) {
	needPrograms(t, "mkfs.ext4")
	h := startHelper(t)
	run(t, "mkfs.ext4", "-q", "-F", h.device)
	dir, bind, raw := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "raw")
	require.NoError(t, os.WriteFile(raw, nil, 0o600))
	require.NoError(t, unix.Mount(h.device, dir, "ext4", 0, ""))
	require.NoError(t, unix.Mount(dir, bind, "", unix.MS_BIND, ""))
	require.NoError(t, unix.Mount(h.device, raw, "", unix.MS_BIND, ""))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("dirty"), 0o600))

	cleaned, err := blockdev.Cleanup(t.Context(), h.runDir, nil)
	require.NoError(t, err)
	require.Empty(t, cleaned, "a live process is left alone")
	require.FileExists(t, filepath.Join(dir, "f"))

	h.kill(t)
	cleaned, err = blockdev.Cleanup(t.Context(), h.runDir, nil)
	require.NoError(t, err)
	require.Equal(t, []string{"vol-dead"}, cleaned)
	requireNothingLeft(t, h.runDir)
	mounts := readFile(t, "/proc/self/mountinfo")
	for _, point := range []string{dir, bind, raw} {
		require.NotContains(t, mounts, point)
	}
	cleaned, err = blockdev.Cleanup(t.Context(), h.runDir, nil)
	require.NoError(t, err)
	require.Empty(t, cleaned, "the second time there is nothing to do")
}

// TestCleanupWithAnOpenFile: a pod still uses the filesystem, so all is detached lazily; the
// loop device goes with the pod's last file.
func TestCleanupWithAnOpenFile(t *testing.T) {
	needPrograms(t, "mkfs.ext4")
	h := startHelper(t)
	run(t, "mkfs.ext4", "-q", "-F", h.device)
	dir := t.TempDir()
	require.NoError(t, unix.Mount(h.device, dir, "ext4", 0, ""))
	f, err := os.Create(filepath.Join(dir, "f"))
	require.NoError(t, err)
	h.kill(t)
	cleaned, err := blockdev.Cleanup(t.Context(), h.runDir, nil)
	require.NoError(t, err)
	require.Equal(t, []string{"vol-dead"}, cleaned)
	require.NotContains(t, readFile(t, "/proc/self/mountinfo"), dir)
	_ = f.Close() // its data are lost, and it may say so
	sysfs := "/sys/block/" + filepath.Base(h.device) + "/loop/backing_file"
	require.Eventually(t, func() bool {
		b, err := os.ReadFile(sysfs)
		return err != nil || strings.TrimSpace(string(b)) != "/"
	}, time.Minute, 10*time.Millisecond, "the loop device must go with its last user")
}

// TestKillDuringDetach: whenever it is killed, the process must die, so Detach must not wait in
// the kernel for the process itself.
func TestKillDuringDetach(t *testing.T) {
	h := startHelper(t)
	_, err := io.WriteString(h.in, "detach\n")
	require.NoError(t, err)
	h.expect(t, "flushing: ")
	require.NoError(t, h.cmd.Process.Kill())
	died := make(chan error, 1)
	go func() { died <- h.cmd.Wait() }()
	require.Eventually(t, func() bool { return len(died) == 1 }, time.Minute, time.Millisecond)
	cleaned, err := blockdev.Cleanup(t.Context(), h.runDir, nil)
	require.NoError(t, err)
	require.Equal(t, []string{"vol-dead"}, cleaned)
	requireNothingLeft(t, h.runDir)
}

// TestCleanupOfACorpse kills the helper while it waits in the kernel for its own flush, as a
// mistake elsewhere may make it: the thread that waits cannot die, keeps the descriptors open,
// and is freed by aborting the connection only.
func TestCleanupOfACorpse(t *testing.T) {
	h := startHelper(t)
	_, err := io.WriteString(h.in, "fsync\n")
	require.NoError(t, err)
	h.expect(t, "flushing: ")
	require.NoError(t, h.cmd.Process.Kill())
	// Its other threads are gone, or soon will be; then nothing serves the connection any more.
	require.Eventually(t, func() bool {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", h.cmd.Process.Pid))
		return err == nil && len(tasks) <= 2
	}, time.Minute, 10*time.Millisecond)
	cleaned, err := blockdev.Cleanup(t.Context(), h.runDir, nil)
	require.NoError(t, err)
	require.Equal(t, []string{"vol-dead"}, cleaned)
	requireNothingLeft(t, h.runDir)
	require.Error(t, h.cmd.Wait())
}

// TestAttachAfterKill: Attach itself clears the way.
func TestAttachAfterKill(t *testing.T) {
	h := startHelper(t)
	h.kill(t)
	a, err := blockdev.Attach(t.Context(), blockdev.Config{
		Name: "vol-dead", RunDir: h.runDir, Device: faultdev.NewMem(16 << 20),
	})
	require.NoError(t, err)
	require.NoError(t, a.Detach(t.Context()))
	requireNothingLeft(t, h.runDir)
}

// TestCleanupTouchesNothingElse plants a record that names a loop device which is not ours.
func TestCleanupTouchesNothingElse(t *testing.T) {
	h := startHelper(t)
	h.kill(t)
	record := filepath.Join(h.runDir, "vol-dead", "record.json")
	planted := strings.ReplaceAll(readFile(t, record), "vol-dead", "vol-other")
	other := filepath.Join(h.runDir, "vol-other")
	require.NoError(t, os.Mkdir(other, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(other, "lock"), nil, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(other, "record.json"), []byte(planted), 0o600))
	strange := filepath.Join(h.runDir, "strange") // a folder without lock: somebody else's
	require.NoError(t, os.Mkdir(strange, 0o700))
	broken := filepath.Join(h.runDir, "vol-broken")
	require.NoError(t, os.Mkdir(broken, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(broken, "lock"), nil, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(broken, "record.json"), []byte("{"), 0o600))
	require.NoError(t, os.Rename(filepath.Join(h.runDir, "vol-dead", "lock"), filepath.Join(h.runDir, "lock")))

	cleaned, err := blockdev.Cleanup(t.Context(), h.runDir, nil)
	require.ErrorContains(t, err, "vol-broken", "an unreadable record is reported, never guessed at")
	require.Equal(t, []string{"vol-other"}, cleaned, "the folder goes")
	require.Equal(t, filepath.Join(h.runDir, "vol-dead", "device")+"\n",
		readFile(t, "/sys/block/"+filepath.Base(h.device)+"/loop/backing_file"), "the loop device stays")
	require.DirExists(t, strange)

	require.NoError(t, os.Rename(filepath.Join(h.runDir, "lock"), filepath.Join(h.runDir, "vol-dead", "lock")))
	require.NoError(t, os.RemoveAll(broken))
	require.NoError(t, os.RemoveAll(strange))
}

func TestCleanupWithoutRunDir(t *testing.T) {
	t.Parallel()
	cleaned, err := blockdev.Cleanup(t.Context(), filepath.Join(t.TempDir(), "none"), nil)
	require.NoError(t, err)
	require.Empty(t, cleaned)
}
