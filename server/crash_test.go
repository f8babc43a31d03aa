package server_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/internal/testutil"
	"github.com/trivet-csi/trivet/server"
)

const (
	crashRounds  = 20
	crashBlocksN = 256
	crashVolume  = "crash"
)

// process is a server in a process of its own.
type process struct {
	cfg    server.Config
	cmd    *exec.Cmd
	exited chan struct{}
	admin  api.AdminClient
}

// fleet is three processes that get killed.
type fleet struct {
	t         testing.TB
	dir       string
	processes []*process
}

func newFleet(t testing.TB, change ...func(*server.Config)) *fleet {
	t.Helper()
	dir, err := os.MkdirTemp("", "trivet-crash-")
	require.NoError(t, err)
	f := &fleet{t: t, dir: dir}
	t.Cleanup(func() {
		for _, p := range f.processes {
			p.end(t, syscall.SIGTERM)
		}
		if t.Failed() {
			for _, p := range f.processes {
				text, err := os.ReadFile(filepath.Join(dir, string(p.cfg.Node)+".log"))
				t.Logf("log of %s (%v):\n%s", p.cfg.Node, err, tail(text, 4000))
			}
		}
		if err := os.RemoveAll(dir); !t.Failed() { // else devices may be left
			require.NoError(t, err)
		}
	})
	ca, err := pki.NewCA(trivet.ClusterID(trivet.NewUUID()), pki.For(pki.CAValidity))
	require.NoError(t, err)
	issue := func(folder string, role pki.Role, name string) {
		pair, err := ca.Issue(pki.Identity{Cluster: ca.Cluster(), Role: role, Name: name}, pki.For(pki.LeafValidity))
		require.NoError(t, err)
		require.NoError(t, pki.Write(filepath.Join(dir, folder), ca.CertPEM(), pair))
	}
	issue("client", pki.RoleClient, "test")
	creds, err := pki.Open(filepath.Join(dir, "client"), pki.RoleClient, nil)
	require.NoError(t, err)
	host := testutil.Loopback() // with all ports free, before the first start and after each kill
	addresses := []string{net.JoinHostPort(host, "7401"), net.JoinHostPort(host, "7402"), net.JoinHostPort(host, "7403")}
	for i, address := range addresses {
		name := fmt.Sprintf("node-%d", i)
		issue(filepath.Join(name, "certs"), pki.RoleNode, name)
		cfg := server.DefaultConfig()
		cfg.Node, cfg.Listen, cfg.Seeds = trivet.NodeID(name), address, addresses
		cfg.DataDir, cfg.CertsDir = filepath.Join(dir, name, "data"), filepath.Join(dir, name, "certs")
		cfg.RunDir = filepath.Join(dir, name, "run")
		for _, c := range change {
			c(&cfg)
		}
		conn, err := grpc.NewClient("passthrough:///"+address,
			grpc.WithTransportCredentials(credentials.NewTLS(creds.ClientConfig("", "h2"))))
		require.NoError(t, err)
		t.Cleanup(func() { conn.Close() })
		p := &process{cfg: cfg, admin: api.NewAdminClient(conn)}
		f.processes = append(f.processes, p)
		f.start(p)
	}
	return f
}

func tail(text []byte, n int) []byte { return text[max(0, len(text)-n):] }

func (f *fleet) start(p *process) {
	f.t.Helper()
	logPath := filepath.Join(f.dir, string(p.cfg.Node)+".log")
	logFile, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(f.t, err)
	defer logFile.Close()
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), childEnv+"="+childSpec(&p.cfg))
	p.cmd.Stdout, p.cmd.Stderr = logFile, logFile
	require.NoError(f.t, p.cmd.Start())
	p.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		_ = cmd.Wait() // killed on purpose
		close(exited)
	}(p.cmd, p.exited)
}

func (p *process) end(t testing.TB, sig syscall.Signal) {
	t.Helper()
	select {
	case <-p.exited:
		return
	default:
	}
	require.NoError(t, p.cmd.Process.Signal(sig))
	select {
	case <-p.exited:
	case <-time.After(2 * time.Minute):
		_ = p.cmd.Process.Kill()
		t.Errorf("%s did not end on %v", p.cfg.Node, sig)
	}
}

// eventually polls, as one must with other processes.
func (f *fleet) eventually(what string, ask func(ctx context.Context) error) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 2*time.Minute)
	defer cancel()
	for {
		try, stop := context.WithTimeout(ctx, 20*time.Second)
		err := ask(try)
		stop()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			require.FailNow(f.t, "timed out", "%s: last error: %v", what, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// serving is a volume served by one process, and a client of it.
type serving struct {
	by     *process
	client *nbdClient
	stop   context.CancelFunc
}

// serve attaches the volume to p, by force if a dead process holds it, and connects.
func (f *fleet) serve(p *process) *serving {
	f.t.Helper()
	s := &serving{by: p}
	socket := filepath.Join(f.dir, string(p.cfg.Node)+".nbd")
	f.eventually("serve the volume on "+string(p.cfg.Node), func(ctx context.Context) error {
		if _, err := p.admin.DetachVolume(ctx, &api.DetachVolumeRequest{Name: crashVolume, Force: true}); err != nil {
			return err
		}
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

func (s *serving) end() {
	_ = s.client.close() // the server may be dead already
	s.stop()
}

// oracle remembers, for each block, the newest write that a flush covered and the newest issued.
// After any crash the block must hold one of those from the first to the second.
type oracle struct {
	seq     uint64
	issued  [crashBlocksN]uint64
	written [crashBlocksN]uint64 // acknowledged, not yet covered by a flush
	flushed [crashBlocksN]uint64
}

func stamp(lba int, seq uint64) []byte {
	block := bytes.Repeat([]byte{byte(seq)}, trivet.BlockSize)
	binary.BigEndian.PutUint64(block, uint64(lba))
	binary.BigEndian.PutUint64(block[8:], seq)
	binary.BigEndian.PutUint32(block[16:], crc32.ChecksumIEEE(block[20:]))
	return block
}

// work writes random blocks and flushes now and then, until ctx ends or the connection breaks.
func (o *oracle) work(ctx context.Context, c *nbdClient, r *rand.Rand) error {
	for ctx.Err() == nil {
		for range 1 + r.IntN(8) {
			lba := r.IntN(crashBlocksN)
			o.seq++
			o.issued[lba] = o.seq
			if err := c.write(stamp(lba, o.seq), int64(lba)*trivet.BlockSize); err != nil {
				return err
			}
			o.written[lba] = o.seq
		}
		if err := c.flush(); err != nil {
			return err
		}
		o.flushed = o.written
	}
	return nil
}

// check reads every block.
func (o *oracle) check(c *nbdClient) error {
	block := make([]byte, trivet.BlockSize)
	for lba := range crashBlocksN {
		if err := c.read(block, int64(lba)*trivet.BlockSize); err != nil {
			return err
		}
		seq := binary.BigEndian.Uint64(block[8:])
		if seq == 0 && o.flushed[lba] == 0 && bytes.Equal(block, make([]byte, trivet.BlockSize)) {
			continue // never written, or never flushed and lost
		}
		if !bytes.Equal(block, stamp(lba, seq)) {
			return fmt.Errorf("block %d holds neither zeroes nor a whole write", lba)
		}
		if seq < o.flushed[lba] || seq > o.issued[lba] {
			return fmt.Errorf("block %d holds write %d; flushed %d, issued %d", lba, seq, o.flushed[lba], o.issued[lba])
		}
		o.written[lba] = seq // what survived is what a later flush will cover
	}
	return nil
}

// TestSIGKILL kills one of three processes in each round, the one that serves the volume included,
// while a writer writes and flushes. Nothing that a flush covered may be missing, and the writer
// gets no error unless the process that serves it died.
func TestSIGKILL(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("kills processes for a minute or two; not with -short")
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	f := newFleet(t)
	f.eventually("cluster init", func(ctx context.Context) error {
		_, err := f.processes[0].admin.InitCluster(ctx, &api.InitClusterRequest{})
		return err
	})
	f.awaitUp()
	f.eventually("create the volume", func(ctx context.Context) error {
		_, err := f.processes[0].admin.CreateVolume(ctx, &api.CreateVolumeRequest{Name: crashVolume, SizeBytes: 64 << 20})
		return err
	})
	o := &oracle{}
	served := f.serve(f.processes[2])
	kills := 0
	for round := range crashRounds {
		victim := f.processes[r.IntN(len(f.processes))]
		before := o.seq
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- o.work(ctx, served.client, r) }()
		pause(t, time.Duration(100+rand.IntN(400))*time.Millisecond) //nolint:gosec // when to kill needs no secrecy
		victim.end(t, syscall.SIGKILL)
		kills++
		if victim == served.by {
			require.Error(t, <-done, "the writer's own server died")
		} else {
			pause(t, 300*time.Millisecond)
			cancel()
			require.NoError(t, <-done, "round %d: %s died, not the writer's server", round, victim.cfg.Node)
		}
		cancel()
		f.start(victim)
		if victim == served.by {
			served.end()
			served = f.serve(f.processes[r.IntN(len(f.processes))])
		}
		require.NoError(t, o.check(served.client), "round %d: after the death of %s", round, victim.cfg.Node)
		require.Greater(t, o.seq, before, "round %d: nothing was written", round)
		f.awaitUp()
	}
	served.end()
	t.Logf("%d kills, %d writes, nothing flushed was lost", kills, o.seq)
}

// pause lets other processes run for a while: how long a writer writes before the kill.
func pause(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-t.Context().Done():
	case <-time.After(d):
	}
}

// awaitUp waits until every process is up and votes.
func (f *fleet) awaitUp() {
	f.t.Helper()
	f.eventually("three voters", func(ctx context.Context) error {
		for _, p := range f.processes {
			resp, err := p.admin.ListNodes(ctx, &api.ListNodesRequest{})
			if err != nil {
				return err
			}
			up := 0
			for _, n := range resp.GetNodes() {
				if n.GetState() == "Up" && n.GetRole() != "Learner" {
					up++
				}
			}
			if up != len(f.processes) {
				return errors.New("not all up")
			}
		}
		return nil
	})
}
