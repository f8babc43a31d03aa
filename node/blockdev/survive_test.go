package blockdev_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/blockdev"
	"github.com/trivet-csi/trivet/node/keeper"
)

// survivorEnv makes the test binary a server or a keeper: its value is a survivorConfig.
const survivorEnv = "TRIVET_TEST_SURVIVOR"

// survivorConfig says what a helper process does.
type survivorConfig struct {
	Keeper   bool // be the keeper, else a server
	Socket   string
	RunDir   string
	File     string        // that the Device keeps its data in
	Latency  time.Duration // of the Device
	Hang     bool          // no write is ever answered
	Shared   bool          // see blockdev.Config
	Watchdog time.Duration
	Resume   bool // whatever it finds, and never attach anew
	// Namespace: in a mount namespace that dies with the process, as a container's.
	Namespace bool
}

func runSurvivor(text string) error {
	var cfg survivorConfig
	if err := json.Unmarshal([]byte(text), &cfg); err != nil {
		return err
	}
	if cfg.Namespace {
		if err := leaveOthers(); err != nil {
			return err
		}
	}
	ctx, log := context.Background(), slog.New(slog.NewTextHandler(os.Stderr, nil))
	if cfg.Keeper {
		k, err := keeper.Open(keeper.Config{Socket: cfg.Socket, Watchdog: cfg.Watchdog, Logger: log})
		if err != nil {
			return err
		}
		fmt.Println("keeping: yes") //nolint:forbidigo // the parent reads it
		return k.Serve(ctx)
	}
	dev, err := openSlowFile(cfg)
	if err != nil {
		return err
	}
	c := blockdev.Config{
		Name: "vol-1", RunDir: cfg.RunDir, Device: dev, Keeper: keeper.NewClient(cfg.Socket, nil, log), Logger: log,
		Shared: cfg.Shared,
	}
	left := []string{c.Name}
	if !cfg.Resume {
		if left, err = (blockdev.Leftovers{RunDir: cfg.RunDir, Keeper: c.Keeper, Logger: log}).Resumable(ctx); err != nil {
			return err
		}
	}
	var a *blockdev.Attachment
	if len(left) == 1 {
		a, err = blockdev.Resume(ctx, c)
	} else {
		a, err = blockdev.Attach(ctx, c)
	}
	if err != nil {
		return err
	}
	fmt.Printf("attached: %s %d\n", a.Path(), len(left)) //nolint:forbidigo // the parent reads it
	return serveOrders(ctx, a)
}

// leaveOthers unmounts, in this process's own mount namespace, what other tests have mounted. With a copy of the mount
// here its device would stay in use when they are done with it.
func leaveOthers() error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		own, super, _ := strings.Cut(line, " - ") // proc_pid_mountinfo(5)
		fields, source := strings.Fields(own), strings.Fields(super)
		if len(fields) < 5 || len(source) < 2 || !strings.HasPrefix(fields[4], os.TempDir()+"/") {
			continue
		}
		if !strings.HasPrefix(source[1], "/dev/loop") && !strings.HasPrefix(source[0], "fuse.") {
			continue
		}
		err := unix.Unmount(fields[4], unix.MNT_DETACH)
		// It goes by itself, with its directory, when the others are done with that.
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", fields[4], err)
		}
	}
	return nil
}

// serveOrders does what the parent says on our input.
func serveOrders(ctx context.Context, a *blockdev.Attachment) error {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var err error
		switch in.Text() {
		case "release":
			ctx, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
			err = a.Release(ctx)
			cancel()
		case "detach":
			err = a.Detach(ctx)
		case "survives":
			err = a.Survives()
		case "resent":
			n, ok := a.Resent()
			err = fmt.Errorf("%t, %+v", ok, n)
		}
		fmt.Printf("done: %v\n", err) //nolint:forbidigo // the parent reads it
	}
	return in.Err()
}

// slowFile is a Device in a file, each request of which takes a while, so that a kill meets many.
type slowFile struct {
	f       *os.File
	n       int64
	latency time.Duration
	hang    bool
}

func openSlowFile(cfg survivorConfig) (*slowFile, error) {
	f, err := os.OpenFile(cfg.File, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return &slowFile{f: f, n: st.Size(), latency: cfg.Latency, hang: cfg.Hang}, nil
}

func (d *slowFile) Size() int64 { return d.n }

func (d *slowFile) wait(ctx context.Context) error {
	select {
	case <-time.After(d.latency):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *slowFile) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := trivet.CheckRange(off, int64(len(p)), d.n); err != nil {
		return err
	}
	_, err := d.f.ReadAt(p, off)
	return err
}

func (d *slowFile) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := trivet.CheckRange(off, int64(len(p)), d.n); err != nil {
		return err
	}
	if d.hang {
		fmt.Println("holding: yes") //nolint:forbidigo // the parent reads it
		<-ctx.Done()
		return ctx.Err()
	}
	if err := d.wait(ctx); err != nil {
		return err
	}
	_, err := d.f.WriteAt(p, off)
	return err
}

func (d *slowFile) Discard(ctx context.Context, off, n int64) error {
	return d.WriteZeroes(ctx, off, n)
}

func (d *slowFile) WriteZeroes(_ context.Context, off, n int64) error {
	if err := trivet.CheckRange(off, n, d.n); err != nil || n == 0 {
		return err
	}
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (d *slowFile) Flush(ctx context.Context) error { return d.wait(ctx) } // the file outlives the process as it is

// survivor is a helper process.
type survivor struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.Writer
	lines chan string // closed when the process ends
	early []string    // lines that came before the one expected
}

func startSurvivor(t *testing.T, cfg survivorConfig) *survivor {
	t.Helper()
	exe, err := os.Executable()
	require.NoError(t, err)
	command := []string{exe}
	if cfg.Namespace {
		command = []string{"unshare", "--mount", "--propagation", "private", exe}
	}
	text, err := json.Marshal(cfg)
	require.NoError(t, err)
	s := &survivor{t: t, cmd: exec.Command(command[0], command[1:]...)}
	s.cmd.Env = append(os.Environ(), survivorEnv+"="+string(text))
	s.cmd.Stderr = t.Output()
	out, err := s.cmd.StdoutPipe()
	require.NoError(t, err)
	s.in, err = s.cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, s.cmd.Start())
	t.Cleanup(func() { _, _ = s.cmd.Process.Kill(), s.cmd.Wait() })
	s.lines = make(chan string, 100)
	go func() {
		defer close(s.lines)
		for in := bufio.NewScanner(out); in.Scan(); {
			s.lines <- in.Text()
		}
	}()
	return s
}

// next returns the next line, "" at the end. It does not wait for ever: then the test would hang in the
// kernel, on a device that nobody serves, instead of failing.
func (s *survivor) next() string {
	s.t.Helper()
	select {
	case line := <-s.lines:
		return line
	case <-time.After(time.Minute):
		require.Fail(s.t, "the helper says nothing", "heard %q", s.early)
		return ""
	}
}

// expect waits for a line that begins so and returns the rest. Other lines are kept for a later call.
func (s *survivor) expect(prefix string) string {
	s.t.Helper()
	for i, line := range s.early {
		if rest, ok := strings.CutPrefix(line, prefix); ok {
			s.early = slices.Delete(s.early, i, i+1)
			return rest
		}
	}
	for line := s.next(); line != ""; line = s.next() {
		if rest, ok := strings.CutPrefix(line, prefix); ok {
			return rest
		}
		require.NotContains(s.t, line, "failed: ")
		s.early = append(s.early, line)
	}
	require.Fail(s.t, "the helper ended", "waited for %q, heard %q", prefix, s.early)
	return ""
}

func (s *survivor) order(what, want string) {
	s.t.Helper()
	_, err := io.WriteString(s.in, what+"\n")
	require.NoError(s.t, err)
	require.Contains(s.t, s.expect("done: "), want)
}

// kill kills the process and waits until it is gone.
func (s *survivor) kill() {
	s.t.Helper()
	require.NoError(s.t, s.cmd.Process.Kill())
	require.Error(s.t, s.cmd.Wait())
}

// survival is a keeper, and servers that come and go.
type survival struct {
	t      *testing.T
	cfg    survivorConfig
	keeper *survivor
	device string
}

func newSurvival(t *testing.T, sizeBytes int64) *survival {
	t.Helper()
	needKernel(t)
	dir := t.TempDir()
	s := &survival{t: t, cfg: survivorConfig{
		Socket: filepath.Join(dir, "keeper", "sock"), RunDir: filepath.Join(dir, "run"), File: filepath.Join(dir, "data"),
		Watchdog: time.Minute,
	}}
	require.NoError(t, os.WriteFile(s.cfg.File, nil, 0o600))
	require.NoError(t, os.Truncate(s.cfg.File, sizeBytes))
	t.Cleanup(func() { // whatever a failed test left, and the keeper, whose death is what frees it
		s.keeper.cmd.Process.Kill() //nolint:errcheck // may be dead
		s.keeper.cmd.Wait()         //nolint:errcheck // killed
		_, err := blockdev.Cleanup(context.WithoutCancel(t.Context()), s.cfg.RunDir, nil)
		require.NoError(t, err)
		requireNothingLeft(t, s.cfg.RunDir)
	})
	s.startKeeper()
	return s
}

func (s *survival) startKeeper() {
	s.t.Helper()
	cfg := s.cfg
	cfg.Keeper = true
	s.keeper = startSurvivor(s.t, cfg)
	s.keeper.expect("keeping: ")
}

// startServer starts a server, which attaches, or resumes if resumed is 1.
func (s *survival) startServer(resumed int, change func(*survivorConfig)) *survivor {
	s.t.Helper()
	cfg := s.cfg
	if change != nil {
		change(&cfg)
	}
	server := startSurvivor(s.t, cfg)
	device, n, _ := strings.Cut(server.expect("attached: "), " ")
	require.Equal(s.t, strconv.Itoa(resumed), n, "attachments resumed")
	if resumed == 1 {
		require.Equal(s.t, s.device, device, "the same device")
	}
	s.device = device
	return server
}

// skipUnlessResend skips where the kernel cannot send requests again.
func skipUnlessResend(t *testing.T, server *survivor) {
	t.Helper()
	_, err := io.WriteString(server.in, "survives\n")
	require.NoError(t, err)
	if why := server.expect("done: "); strings.Contains(why, "from 6.9 on") {
		server.kill()
		t.Skip(why)
	} else {
		require.Equal(t, "<nil>", why)
	}
}

// outcome returns what became of a request, which must not wait for ever.
func outcome(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(time.Minute):
		require.Fail(t, "nobody has answered the request")
		return nil
	}
}

// written returns how many bytes were ever written to a block device (Documentation/block/stat.rst).
func written(t *testing.T, device string) int64 {
	t.Helper()
	fields := strings.Fields(readFile(t, "/sys/block/"+filepath.Base(device)+"/stat"))
	n, err := strconv.ParseInt(fields[6], 10, 64)
	require.NoError(t, err)
	return n * 512
}

// TestResumeUnderFio kills the server three times while fio writes to a file of a mounted filesystem,
// and once lets it release the device: fio sees no error, and neither do verify and fsck.
func TestResumeUnderFio(t *testing.T) {
	for _, fs := range filesystems {
		t.Run(fs.name, func(t *testing.T) {
			if testing.Short() {
				t.Skip("takes a while")
			}
			needPrograms(t, "fio", fs.mkfs, fs.check)
			s := newSurvival(t, 512<<20)
			s.cfg.Latency = 4 * time.Millisecond
			server := s.startServer(0, nil)
			skipUnlessResend(t, server)
			run(t, fs.mkfs, append(fs.mkfsArgs, s.device)...)
			dir := t.TempDir()
			require.NoError(t, unix.Mount(s.device, dir, fs.name, 0, ""))
			t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })

			type result struct {
				out string
				err error
			}
			done, last := make(chan result, 1), make(chan struct{})
			go func() { // again and again: it must not end before it was hit often enough, however quick it is
				for {
					out, err := tryRun(t, "fio", "--name=x", "--directory="+dir, "--ioengine=libaio", "--direct=1", "--rw=randwrite",
						"--bsrange=4k-64k", "--blockalign=4k", "--iodepth=16", "--size=64m", "--fsync=32", "--loops=2",
						"--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")
					select {
					case <-last:
					default:
						if err == nil {
							continue
						}
					}
					done <- result{out, err}
					return
				}
			}()
			for _, how := range []string{"kill", "kill", "kill", "release"} {
				next := written(t, s.device) + 24<<20
				require.Eventually(t, func() bool {
					return len(done) > 0 || written(t, s.device) > next
				}, 2*time.Minute, time.Millisecond)
				if len(done) > 0 {
					break // fio failed
				}
				if how == "release" {
					server.order("release", "<nil>")
				}
				server.kill()
				server = s.startServer(1, nil)
			}
			close(last)
			r := <-done
			require.NoError(t, r.err, r.out)
			require.NoError(t, unix.Unmount(dir, 0))
			run(t, fs.check, append(fs.checkArgs, s.device)...)
			server.order("detach", "<nil>")
			requireNothingLeft(t, s.cfg.RunDir)
		})
	}
}

// TestResumeAnswersWhatWasHeld: a write that the dead server had read and not answered is answered by
// the next one, and so is one that was released in the middle.
func TestResumeAnswersWhatWasHeld(t *testing.T) {
	s := newSurvival(t, 16<<20)
	server := s.startServer(0, func(c *survivorConfig) { c.Hang = true })
	skipUnlessResend(t, server)
	f := openDirect(t, s.device)
	buf := aligned(t, 4096)
	buf[0] = 7
	wrote := make(chan error, 1)
	go func() {
		_, err := f.WriteAt(buf, 8192)
		wrote <- err
	}()
	server.expect("holding: ")
	server.kill()
	server = s.startServer(1, func(c *survivorConfig) { c.Hang = true })
	server.expect("holding: ") // the same write again
	server.order("release", "<nil>")
	require.Empty(t, wrote, "nobody has answered")
	next := s.startServer(1, nil) // while the one that released it lives
	require.NoError(t, outcome(t, wrote))
	got := make([]byte, 16<<20)
	copy(got, readFile(t, s.cfg.File))
	require.Equal(t, byte(7), got[8192])
	require.NoError(t, f.Close())
	server.kill()
	next.order("survives", "<nil>")
	next.order("detach", "<nil>")
	requireNothingLeft(t, s.cfg.RunDir)
}

// TestResumeInAnotherMountNamespace: the file of a server whose container is gone is mounted nowhere any
// more, and its device goes on all the same.
func TestResumeInAnotherMountNamespace(t *testing.T) {
	needPrograms(t, "unshare")
	s := newSurvival(t, 16<<20)
	server := s.startServer(0, func(c *survivorConfig) { c.Namespace = true })
	skipUnlessResend(t, server)
	f := openDirect(t, s.device)
	server.kill()
	below := "/sys/block/" + filepath.Base(s.device) + "/loop/backing_file"
	require.Eventually(t, func() bool { return readFile(t, below) == "/\n" }, time.Minute, time.Millisecond)
	next := s.startServer(1, nil)
	buf := aligned(t, 4096)
	_, err := f.WriteAt(buf, 4096)
	require.NoError(t, err)
	next.order("detach", trivet.ErrInUse.Error())
	require.NoError(t, f.Close())
	next.order("detach", "<nil>")
	requireNothingLeft(t, s.cfg.RunDir)
}

// TestOneOfTwoServersResumes: whoever comes second is told so.
func TestOneOfTwoServersResumes(t *testing.T) {
	s := newSurvival(t, 16<<20)
	server := s.startServer(0, nil)
	skipUnlessResend(t, server)
	server.kill()
	cfg := s.cfg
	cfg.Resume = true // to look first would hold the lock, and the other would see nothing to go on with
	one, two := startSurvivor(t, cfg), startSurvivor(t, cfg)
	both := []string{one.next(), two.next()}
	won := 0
	for _, r := range both {
		if strings.HasPrefix(r, "attached: "+s.device+" 1") {
			won++
		} else {
			require.Contains(t, r, trivet.ErrInUse.Error())
		}
	}
	require.Equal(t, 1, won, "%q", both)
	_, err := openDirect(t, s.device).ReadAt(aligned(t, 4096), 0)
	require.NoError(t, err)
}

// TestKeeperComesBack: a keeper that is killed costs nothing while the server lives.
func TestKeeperComesBack(t *testing.T) {
	s := newSurvival(t, 16<<20)
	server := s.startServer(0, nil)
	skipUnlessResend(t, server)
	s.keeper.kill()
	f := openDirect(t, s.device)
	buf := aligned(t, 4096)
	_, err := f.WriteAt(buf, 0)
	require.NoError(t, err, "without a keeper all goes on")
	require.Eventually(t, func() bool {
		_, err := io.WriteString(server.in, "survives\n")
		return err == nil && server.expect("done: ") != "<nil>"
	}, time.Minute, 10*time.Millisecond)
	server.order("release", trivet.ErrUnavailable.Error())
	s.startKeeper()
	require.Eventually(t, func() bool {
		_, err := io.WriteString(server.in, "survives\n")
		return err == nil && server.expect("done: ") == "<nil>"
	}, time.Minute, 10*time.Millisecond, "the new one gets all")
	server.kill()
	server = s.startServer(1, nil)
	_, err = f.WriteAt(buf, 0)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	server.order("detach", "<nil>")
	requireNothingLeft(t, s.cfg.RunDir)
}

// TestWatchdogAborts: nobody waits for ever for a server that does not come back.
func TestWatchdogAborts(t *testing.T) {
	s := newSurvival(t, 16<<20)
	s.keeper.kill()
	s.cfg.Watchdog = 200 * time.Millisecond
	s.startKeeper()
	server := s.startServer(0, func(c *survivorConfig) { c.Hang = true })
	skipUnlessResend(t, server)
	f := openDirect(t, s.device)
	wrote := make(chan error, 1)
	buf := aligned(t, 4096)
	go func() {
		_, err := f.WriteAt(buf, 0)
		wrote <- err
	}()
	server.expect("holding: ")
	server.kill()
	require.ErrorIs(t, outcome(t, wrote), unix.EIO)
	require.NoError(t, f.Close())
	server = s.startServer(0, nil) // the remains are removed, and a new device is made
	server.order("detach", "<nil>")
	requireNothingLeft(t, s.cfg.RunDir)
}

// TestCleanWithKeeper: what is not to be resumed is removed, although the keeper has it.
func TestCleanWithKeeper(t *testing.T) {
	s := newSurvival(t, 16<<20)
	server := s.startServer(0, func(c *survivorConfig) { c.Hang = true })
	skipUnlessResend(t, server)
	f := openDirect(t, s.device)
	wrote := make(chan error, 1)
	buf := aligned(t, 4096)
	go func() {
		_, err := f.WriteAt(buf, 0)
		wrote <- err
	}()
	server.expect("holding: ")
	c := keeper.NewClient(s.cfg.Socket, nil, nil)
	defer c.Close()
	left := blockdev.Leftovers{RunDir: s.cfg.RunDir, Keeper: c}
	require.ErrorIs(t, left.CleanOne(t.Context(), "vol-1"), trivet.ErrInUse, "its process lives")
	server.kill()
	names, err := left.Resumable(t.Context())
	require.NoError(t, err)
	require.Equal(t, []string{"vol-1"}, names)
	cleaned, err := left.Clean(t.Context(), names)
	require.NoError(t, err)
	require.Empty(t, cleaned)
	require.Empty(t, wrote, "still waiting")
	require.NoError(t, left.CleanOne(t.Context(), "vol-1"))
	require.ErrorIs(t, outcome(t, wrote), unix.EIO)
	require.NoError(t, f.Close())
	entries, err := c.List()
	require.NoError(t, err)
	require.Empty(t, entries)
	require.NoError(t, left.CleanOne(t.Context(), "vol-1"), "none is success")
	_, err = blockdev.Resume(t.Context(), blockdev.Config{
		Name: "vol-1", RunDir: s.cfg.RunDir, Device: sized(4096), Keeper: c,
	})
	require.ErrorIs(t, err, trivet.ErrNotFound)
}

// heldWrites begins n writes of a block each, which the server is to hold, and waits until it does.
func heldWrites(t *testing.T, server *survivor, f *os.File, n int) []chan error {
	t.Helper()
	all := beginWrites(t, f, 0, n)
	for range n {
		server.expect("holding: ")
	}
	return all
}

// beginWrites begins n writes of a block each, filled with its number, which is counted from first.
func beginWrites(t *testing.T, f *os.File, first, n int) []chan error {
	t.Helper()
	var all []chan error
	for i := first; i < first+n; i++ {
		buf, done := aligned(t, 4096), make(chan error, 1)
		for k := range buf {
			buf[k] = byte(i + 1)
		}
		go func() {
			_, err := f.WriteAt(buf, int64(i)*4096)
			done <- err
		}()
		all = append(all, done)
	}
	return all
}

// awaitInflight waits until n requests have entered the device and not left it.
func awaitInflight(t *testing.T, device string, n int) {
	t.Helper()
	require.Eventually(t, func() bool {
		var reads, writes int
		_, err := fmt.Sscan(readFile(t, "/sys/block/"+filepath.Base(device)+"/inflight"), &reads, &writes)
		return err == nil && reads+writes >= n
	}, time.Minute, time.Millisecond)
}

// TestResentIsCounted: what the dead server had read is sent again and counted, what had waited in the kernel is not.
func TestResentIsCounted(t *testing.T) {
	s := newSurvival(t, 16<<20)
	server := s.startServer(0, func(c *survivorConfig) { c.Hang = true })
	skipUnlessResend(t, server)
	server.order("resent", "true, {Repeated:0 Refused:0}")
	f := openDirect(t, s.device)
	held := heldWrites(t, server, f, 3)
	server.kill()
	waiting := beginWrites(t, f, 3, 4)
	awaitInflight(t, s.device, 7)
	server = s.startServer(1, nil)
	for _, done := range append(held, waiting...) {
		require.NoError(t, outcome(t, done))
	}
	server.order("resent", "true, {Repeated:3 Refused:0}")
	require.NoError(t, f.Close())
	server.order("detach", "<nil>")
	requireNothingLeft(t, s.cfg.RunDir)
}

// TestResumeOfASharedDevice: another node may have written since where the dead server's writes went, so they are not
// repeated. The device lives, and so does all that had not reached that server.
func TestResumeOfASharedDevice(t *testing.T) {
	s := newSurvival(t, 16<<20)
	s.cfg.Shared = true
	server := s.startServer(0, func(c *survivorConfig) { c.Hang = true })
	skipUnlessResend(t, server)
	f := openDirect(t, s.device)
	held := heldWrites(t, server, f, 2)
	server.kill()
	other, err := os.OpenFile(s.cfg.File, os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = other.WriteAt([]byte("written by the other node"), 0)
	require.NoError(t, err)
	require.NoError(t, other.Close())
	waiting := beginWrites(t, f, 2, 3)
	awaitInflight(t, s.device, 5)
	server = s.startServer(1, nil)
	for _, done := range held {
		require.ErrorIs(t, outcome(t, done), unix.EIO)
	}
	for _, done := range waiting {
		require.NoError(t, outcome(t, done), "no server had read it")
	}
	data := readFile(t, s.cfg.File)
	require.Equal(t, "written by the other node", data[:25])
	require.Equal(t, byte(0), data[4096])
	require.Equal(t, byte(3), data[2*4096])
	server.order("resent", "true, {Repeated:0 Refused:2}")
	for _, done := range beginWrites(t, f, 0, 2) { // the program tries again
		require.NoError(t, outcome(t, done))
	}
	require.NoError(t, f.Close())
	server.order("detach", "<nil>")
	requireNothingLeft(t, s.cfg.RunDir)
}
