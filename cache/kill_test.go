package cache_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
)

// childEnv makes the test binary a writer that is to be killed: "mapping file,disk file,epoch,seed".
const childEnv = "TRIVET_TEST_CACHE_WRITER"

const (
	killBlocks = 512
	killPiece  = 4 // blocks a write
)

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		if err := writer(strings.Split(spec, ",")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// fileDisk is a Device over a file: what was written there outlives the process, as a commit by a quorum does.
type fileDisk struct{ *os.File }

func (f fileDisk) ReadAt(_ context.Context, p []byte, off int64) error {
	_, err := f.File.ReadAt(p, off)
	return err
}

func (f fileDisk) WriteAt(_ context.Context, p []byte, off int64) error {
	_, err := f.File.WriteAt(p, off)
	return err
}

func (f fileDisk) Discard(ctx context.Context, off, n int64) error {
	return f.WriteAt(ctx, make([]byte, n), off)
}

func (f fileDisk) WriteZeroes(ctx context.Context, off, n int64) error {
	return f.WriteAt(ctx, make([]byte, n), off)
}
func (f fileDisk) Flush(context.Context) error { return nil }
func (f fileDisk) Size() int64                 { return killBlocks * trivet.BlockSize }

func openDisk(path string) (fileDisk, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = f.Truncate(killBlocks * trivet.BlockSize)
	}
	return fileDisk{f}, err
}

func killConfig(epoch trivet.Epoch) cache.Config {
	cfg := config(cache.WriteBack, small)
	cfg.Epoch, cfg.Deadline = epoch, 5*time.Millisecond
	return cfg
}

// writer takes over the mapping file and writes until it is killed. It says on stdout what it is about to write, and
// what was acknowledged: place and stamp, a minus sign before what was only begun.
func writer(spec []string) error {
	var epoch trivet.Epoch
	var seed uint64
	if _, err := fmt.Sscan(spec[2]+" "+spec[3], &epoch, &seed); err != nil {
		return err
	}
	disk, err := openDisk(spec[1])
	if err != nil {
		return err
	}
	l, err := cache.Lock(spec[0])
	if err != nil {
		return err
	}
	if err := l.Adopt(cluster, volume, epoch-1); err != nil {
		return err
	}
	d, err := cache.Open(disk, l, killConfig(epoch))
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(seed, 0))
	p := make([]byte, killPiece*trivet.BlockSize)
	for stamp := int64(epoch) << 32; ; stamp++ {
		at := r.Int64N(killBlocks / killPiece)
		for b := range killPiece {
			binary.LittleEndian.PutUint64(p[b*trivet.BlockSize:], uint64(stamp))
		}
		fmt.Fprintf(os.Stdout, "%d %d\n", at, -stamp)
		if err := d.WriteAt(context.Background(), p, at*killPiece*trivet.BlockSize); err != nil {
			return err
		}
		fmt.Fprintf(os.Stdout, "%d %d\n", at, stamp)
		if stamp%64 == 0 {
			if err := d.Flush(context.Background()); err != nil {
				return err
			}
		}
	}
}

// TestSIGKILL kills a writing process at random instants, and lets the next take over, on a real tmpfs. Every write
// that it said was acknowledged is there, and each is whole.
func TestSIGKILL(t *testing.T) {
	t.Parallel()
	rounds := 30
	if testing.Short() {
		rounds = 5
	}
	dir := tmpfsDir(t)
	mapping, disk := filepath.Join(dir, "c"), filepath.Join(dir, "d")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var acked, begun [killBlocks / killPiece]int64
	dirty := int64(0)
	// A writer that waits for us to read is killed with nothing dirty: one death in ten, and more on a slow machine.
	for round := 0; round < rounds || dirty == 0 && round < 10*rounds; round++ {
		epoch := trivet.Epoch(2*round + 2)
		writes := killOne(t, fmt.Sprintf("%s,%s,%d,%d", mapping, disk, epoch, seed+uint64(round)), acked[:], begun[:])
		require.Positive(t, writes)
		l, err := cache.Lock(mapping)
		require.NoError(t, err)
		left, err := l.Dirty()
		require.NoError(t, err)
		dirty += left
		require.NoError(t, l.Adopt(cluster, volume, epoch))
		below, err := openDisk(disk)
		require.NoError(t, err)
		d, err := cache.Open(below, l, killConfig(epoch+1))
		require.NoError(t, err)
		for _, dev := range []trivet.Device{d, below} { // through the cache, and once all was written back
			p := make([]byte, killBlocks*trivet.BlockSize)
			require.NoError(t, dev.ReadAt(t.Context(), p, 0))
			for at := range acked {
				first := int64(0)
				for b := range killPiece {
					stamp := int64(binary.LittleEndian.Uint64(p[(at*killPiece+b)*trivet.BlockSize:]))
					if b == 0 {
						first = stamp
					}
					require.Equal(t, first, stamp, "round %d: write at %d is torn", round, at)
				}
				require.True(t, first >= acked[at] && first <= max(begun[at], acked[at]),
					"round %d: %d holds %x; acknowledged %x, begun %x", round, at, first, acked[at], begun[at])
				acked[at] = first
			}
			require.NoError(t, d.Flush(t.Context()))
		}
		require.NoError(t, d.Abandon()) // the next child takes over from an empty cache, at the next epoch
	}
	require.Positive(t, dirty, "nothing was dirty at any death: the test shows nothing")
}

// killOne runs a writer, kills it, and notes what it said.
func killOne(t *testing.T, spec string, acked, begun []int64) int {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+spec)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	writes := 0
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		var at, stamp int64
		_, err = fmt.Sscan(line, &at, &stamp)
		require.NoError(t, err)
		if stamp < 0 {
			begun[at] = -stamp
		} else {
			acked[at] = stamp
			if writes++; writes == 1 { // from here on: a process takes its time to begin
				life := time.Duration(rand.IntN(150)) * time.Millisecond
				defer time.AfterFunc(life, func() { _ = cmd.Process.Kill() }).Stop()
			}
		}
	}
	require.Error(t, cmd.Wait(), "it was to be killed")
	return writes
}
