package server_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/server"
)

// cacheDirEnv is the CacheDir of a server in a process of its own.
const cacheDirEnv = "TRIVET_TEST_CACHE_DIR"

// newCachedFleet is a fleet with a writeBack volume.
func newCachedFleet(t *testing.T) *fleet {
	t.Helper()
	if testing.Short() {
		t.Skip("kills processes; not with -short")
	}
	if err := cache.CheckDir("/dev/shm"); err != nil {
		t.Skipf("no tmpfs at /dev/shm: %v", err)
	}
	dir, err := os.MkdirTemp("/dev/shm", "trivet-test-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	t.Setenv(cacheDirEnv, dir)
	f := newFleet(t)
	f.eventually("cluster init", func(ctx context.Context) error {
		_, err := f.processes[0].admin.InitCluster(ctx, &api.InitClusterRequest{})
		return err
	})
	f.awaitUp()
	f.eventually("create the volume", func(ctx context.Context) error {
		_, err := f.processes[0].admin.CreateVolume(ctx, &api.CreateVolumeRequest{
			Name: crashVolume, SizeBytes: 64 << 20, Parameters: map[string]string{"cacheMode": "writeBack"},
		})
		return err
	})
	return f
}

// reserve serves the volume on the process that holds it, as nobody has it detached.
func (f *fleet) reserve(p *process) *serving {
	f.t.Helper()
	s := &serving{by: p}
	socket := filepath.Join(f.dir, string(p.cfg.Node)+".nbd")
	f.eventually("serve the volume again on "+string(p.cfg.Node), func(ctx context.Context) error {
		life, stop := context.WithCancel(f.t.Context())
		stream, err := p.admin.ServeVolume(life, &api.ServeVolumeRequest{Name: crashVolume, Socket: socket})
		if err == nil {
			_, err = stream.Recv()
		}
		if err == nil {
			s.client, err = dialNBD(ctx, socket, crashVolume)
		}
		if err != nil {
			stop()
			return err
		}
		s.stop = stop
		return nil
	})
	return s
}

// writeUnflushed writes random blocks and never flushes, until ctx ends or the connection breaks. wrote counts them.
func (o *oracle) writeUnflushed(ctx context.Context, c *nbdClient, r *rand.Rand, wrote *atomic.Int64) error {
	for ctx.Err() == nil {
		lba := r.IntN(crashBlocksN)
		o.seq++
		o.issued[lba] = o.seq
		if err := c.write(stamp(lba, o.seq), int64(lba)*trivet.BlockSize); err != nil {
			return err
		}
		o.written[lba] = o.seq
		wrote.Add(1)
	}
	return nil
}

// checkAcknowledged demands every write that was acknowledged.
func (o *oracle) checkAcknowledged(c *nbdClient) error {
	block := make([]byte, trivet.BlockSize)
	for lba := range crashBlocksN {
		if err := c.read(block, int64(lba)*trivet.BlockSize); err != nil {
			return err
		}
		seq := binary.BigEndian.Uint64(block[8:])
		if seq == 0 && o.written[lba] == 0 {
			continue
		}
		if !bytes.Equal(block, stamp(lba, seq)) || seq < o.written[lba] || seq > o.issued[lba] {
			return fmt.Errorf("block %d holds write %d; acknowledged %d, issued %d", lba, seq, o.written[lba], o.issued[lba])
		}
		o.written[lba] = seq
	}
	return nil
}

// killUnderWrites writes without a flush and kills the server of the writer with SIGKILL.
func (f *fleet) killUnderWrites(t *testing.T, o *oracle, s *serving, r *rand.Rand) {
	t.Helper()
	var wrote atomic.Int64
	done, writing := make(chan error, 1), time.Duration(200+r.IntN(500))*time.Millisecond
	go func() { done <- o.writeUnflushed(t.Context(), s.client, r, &wrote) }()
	pause(t, writing)
	require.Eventually(t, func() bool { return wrote.Load() > 100 }, eventuallyTimeout, time.Millisecond)
	s.by.end(t, syscall.SIGKILL)
	require.Error(t, <-done, "the writer's own server died")
	s.end()
}

// cacheFile returns the mapping file of the fleet's volume on p, or "".
func (f *fleet) cacheFile(t *testing.T, p *process) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(os.Getenv(cacheDirEnv), "*", string(p.cfg.Node), "*.cache"))
	require.NoError(t, err)
	if len(found) == 0 {
		return ""
	}
	return found[0]
}

func (f *fleet) logOf(t *testing.T, p *process) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(f.dir, string(p.cfg.Node)+".log"))
	require.NoError(t, err)
	return string(text)
}

// dirtyIn returns how many dirty bytes a dead process has left.
func (f *fleet) dirtyIn(t *testing.T, p *process) int64 {
	t.Helper()
	l, err := cache.Lock(f.cacheFile(t, p))
	require.NoError(t, err)
	defer l.Close()
	bytes, err := l.Dirty()
	require.NoError(t, err)
	return bytes
}

// TestCacheSurvivesSIGKILL: no write that a writeBack volume acknowledged is lost when the server of the writer is
// killed, flushed or not (promise 2), wherever the leader of the group is, and whether or not the volume is used again.
func TestCacheSurvivesSIGKILL(t *testing.T) {
	f := newCachedFleet(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	o := &oracle{}
	holder, other := f.processes[1], f.processes[2]
	s := f.reserve(holder)
	left := int64(0)
	for round := range 6 {
		if round%2 == 1 { // the group is led elsewhere
			f.eventually("move the leader", func(ctx context.Context) error {
				_, err := holder.admin.MoveLeader(ctx, &api.MoveLeaderRequest{Name: crashVolume, Node: string(other.cfg.Node)})
				return err
			})
		}
		f.killUnderWrites(t, o, s, r)
		left += f.dirtyIn(t, holder)
		f.start(holder)
		if round == 4 { // nobody uses it again: the node writes back by itself
			f.eventually("take over", func(context.Context) error {
				if !strings.Contains(f.logOf(t, holder), "wrote back what the last process had acknowledged") {
					return fmt.Errorf("not yet")
				}
				return nil
			})
		}
		s = f.reserve(holder)
		require.NoError(t, o.checkAcknowledged(s.client), "round %d", round)
		f.awaitUp()
	}
	require.Positive(t, left, "nothing was dirty at any death: the test shows nothing")
	require.NoError(t, s.client.flush())
	s.end()
	f.eventually("detach", func(ctx context.Context) error {
		v, err := holder.admin.DetachVolume(ctx, &api.DetachVolumeRequest{Name: crashVolume})
		if err == nil && (v.GetAttachedNode() != "" || f.cacheFile(t, holder) != "") {
			err = fmt.Errorf("attached to %q, file %q", v.GetAttachedNode(), f.cacheFile(t, holder))
		}
		return err
	})
	s = f.reserve(other)
	require.NoError(t, o.checkAcknowledged(s.client), "on another node after a clean detach")
	s.end()
	t.Logf("%d writes, %d bytes dirty at the deaths, none lost", o.seq, left)
}

// TestCacheOfAFencedNodeIsDropped: dirty blocks of a node whose volume went elsewhere by force must never be written
// back (H13).
func TestCacheOfAFencedNodeIsDropped(t *testing.T) {
	f := newCachedFleet(t)
	r := rand.New(rand.NewPCG(1, 2))
	old, next := f.processes[1], f.processes[2]
	dead := &oracle{}
	f.killUnderWrites(t, dead, f.reserve(old), r)
	require.Positive(t, f.dirtyIn(t, old))

	s := f.serve(next) // by force
	fresh := &oracle{seq: 1 << 32}
	for lba := range crashBlocksN {
		fresh.seq++
		require.NoError(t, s.client.write(stamp(lba, fresh.seq), int64(lba)*trivet.BlockSize))
		fresh.issued[lba], fresh.written[lba] = fresh.seq, fresh.seq
	}
	f.start(old)
	f.awaitUp()
	f.eventually("the old node drops its blocks", func(context.Context) error {
		if !strings.Contains(f.logOf(t, old), "dropping acknowledged writes") || f.cacheFile(t, old) != "" {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	require.NoError(t, fresh.checkAcknowledged(s.client))
	require.NoError(t, s.client.flush())
	s.end()

	// And back on the node that was fenced: what is read there is the other's.
	s = f.serve(old)
	require.NoError(t, fresh.checkAcknowledged(s.client))
	s.end()
}

func TestCacheDirectoryMustBeATmpfs(t *testing.T) {
	t.Parallel()
	cfg := server.DefaultConfig()
	cfg.Node, cfg.DataDir, cfg.CertsDir, cfg.Fatal = "n1", "/data", "/certs", func(error) {}
	cfg.Advertise = "n1:7400"
	cfg.CacheDir = "/proc/self/cache"
	require.ErrorIs(t, cfg.Validate(), trivet.ErrInvalid)
	require.ErrorContains(t, cfg.Validate(), "/proc/self/cache is not on a tmpfs")
	cfg.CacheDir = "cache"
	require.ErrorIs(t, cfg.Validate(), trivet.ErrInvalid)
	cfg.CacheDir = server.CacheOff
	require.NoError(t, cfg.Validate())
	for _, n := range []int64{-1, 4<<20 - 1} {
		cfg.ReplayBytes = n
		require.ErrorIs(t, cfg.Validate(), trivet.ErrInvalid)
		require.ErrorContains(t, cfg.Validate(), "replay memory")
	}
	cfg.ReplayBytes = 4 << 20
	require.NoError(t, cfg.Validate())
}
