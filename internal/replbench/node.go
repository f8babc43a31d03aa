package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/node"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	// volumeBytes is the size of the volume, of which little is written.
	volumeBytes = 10 << 30
	// snapshotBytes of log before it is compacted, so that a replica that is away for 256 MiB has to pull.
	snapshotBytes = 16 << 20
)

// The two groups.
const (
	volumeID  = trivet.VolumeID(1) // with the real engine
	entriesID = trivet.VolumeID(2) // with a state machine that keeps nothing
)

// bench is a node process.
type bench struct {
	dir   string
	name  trivet.NodeID
	creds *pki.Credentials
	disk  *node.Disk
	peers *transport.Peers
	mux   *raftgroup.Mux
	host  *replication.Host
	group *raftgroup.Group
	vol   *replication.Volume
	idleN int

	overlap bool
	watcher *watcher

	mu    sync.Mutex
	where map[trivet.NodeID]string
}

// Address implements transport.AddressBook.
func (b *bench) Address(n trivet.NodeID) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.where[n]
}

func serveNode(o *options, in io.Reader, out io.Writer) (err error) {
	b := &bench{dir: filepath.Join(o.dir, o.name), name: trivet.NodeID(o.name), overlap: o.overlap}
	listener, err := b.open()
	defer func() { err = errors.Join(err, b.close()) }()
	if err != nil {
		return err
	}
	defer listener.Close() //nolint:errcheck // the process ends
	go b.accept(listener)
	return serve(in, out, func(a ask) (answer, error) {
		switch a.Do {
		case "hello":
			return answer{Address: listener.Addr().String()}, nil
		case "join":
			return answer{}, b.join(a.Addresses)
		case "status":
			r, ok := b.host.Replica(volumeID)
			return answer{Leads: ok && r.Status().IsLeader && b.group.Status().IsLeader, Idle: b.led()}, nil
		case "idle":
			return answer{}, b.addIdle(a.N)
		case "transfer":
			d, err := b.transfer(a.To)
			return answer{Micros: d.Microseconds()}, err
		case "fence":
			epoch, err := b.fence()
			return answer{Applied: uint64(epoch)}, err
		case "watch":
			return answer{}, b.watch(trivet.Epoch(a.N))
		case "watched":
			d, err := b.watched()
			return answer{Micros: d.Microseconds()}, err
		case "profile":
			return answer{}, profile(a.File)
		case "unpark":
			return answer{}, b.unpark(a.N)
		case "touch":
			return answer{}, b.touch(a.N)
		case "park":
			return answer{}, b.batch(a.N, b.host.ParkReplica)
		case "memory":
			n, err := resident()
			return answer{Bytes: n}, err
		case "away":
			return answer{}, b.host.ParkReplica(context.Background(), b.spec())
		case "back":
			return answer{}, b.host.OpenReplica(context.Background(), b.spec())
		case "where":
			a := answer{Bytes: b.peers.Stats().BytesReceived}
			if r, ok := b.host.Replica(volumeID); ok && !r.Status().CatchUp.Active {
				a.Applied = r.Status().Applied
			}
			return a, nil
		case "fill":
			return answer{}, b.fill(a.N)
		case "yield":
			return answer{}, b.yield(a.To)
		case "usage":
			u, err := used()
			return answer{Usage: u}, err
		case "load":
			r, err := b.load(a.Load)
			return answer{Result: r}, err
		}
		return answer{}, fmt.Errorf("%q is unknown: %w", a.Do, trivet.ErrInvalid)
	})
}

// open makes everything but the groups, whose members are not known yet.
func (b *bench) open() (net.Listener, error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var err error
	if b.creds, err = pki.Open(filepath.Join(b.dir, "certs"), pki.RoleNode, log); err != nil {
		return nil, err
	}
	cfg := node.DiskConfig{
		Dir: filepath.Join(b.dir, "disk"), Cluster: b.creds.Identity().Cluster, Node: b.name, Logger: log, Fatal: fatal,
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	if _, err := node.FormatDisk(cfg); err != nil {
		return nil, err
	}
	if b.disk, err = node.OpenDisk(cfg); err != nil {
		return nil, err
	}
	b.peers, err = transport.NewPeers(transport.Config{
		Local:     b.name,
		ClientTLS: func(n trivet.NodeID) (*tls.Config, error) { return b.creds.ClientConfig(n, transport.ALPN), nil },
		PeerNode:  b.creds.PeerNode, Book: b, Logger: log,
	})
	if err != nil {
		return nil, err
	}
	b.mux = raftgroup.NewMux(b.peers)
	b.host, err = replication.NewHost(replication.HostConfig{
		Network: b.peers, Mux: b.mux, SnapshotBytes: snapshotBytes, OverlapFlush: b.overlap, Logger: log, Fatal: fatal,
	})
	if err != nil {
		return nil, err
	}
	return net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // local
}

func fatal(err error) {
	fmt.Fprintf(os.Stderr, "fatal: %v\n", err)
	os.Exit(1)
}

func (b *bench) accept(l net.Listener) {
	config := b.creds.ServerConfig(pki.Protocols{transport.ALPN: {pki.RoleNode}})
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			c := tls.Server(transport.Wrap(conn), config)
			if err := c.Handshake(); err != nil { //nolint:noctx // of our own children
				c.Close()
				return
			}
			_ = b.peers.ServeConn(c) // ends with the process
		}()
	}
}

// join makes and starts the replicas of both groups.
func (b *bench) join(where map[trivet.NodeID]string) error {
	b.mu.Lock()
	b.where = where
	b.mu.Unlock()
	ctx := context.Background()
	spec := b.spec()
	if err := b.host.CreateReplica(ctx, spec); err != nil {
		return err
	}
	if err := b.host.OpenReplica(ctx, spec); err != nil {
		return err
	}
	cfg := raftgroup.Config{
		Group: entriesID, Replica: replicaOn(b.name, entriesID), Dir: filepath.Join(b.dir, "disk", "groups", "entries"),
		Log: b.disk.Replication().Log, Network: b.mux, Machine: &forgetful{}, OverlapFlush: b.overlap, Fatal: fatal,
	}
	if err := raftgroup.Create(cfg, members(where, entriesID)); err != nil {
		return err
	}
	var err error
	b.group, err = raftgroup.Open(cfg)
	return err
}

// yield gives the leadership of what this node leads to another one.
func (b *bench) yield(to trivet.NodeID) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var errs []error
	if r, ok := b.host.Replica(volumeID); ok && r.Status().IsLeader {
		errs = append(errs, r.TransferTo(ctx, replicaOn(to, volumeID)))
	}
	if b.group.Status().IsLeader {
		errs = append(errs, b.group.TransferTo(ctx, replicaOn(to, entriesID)))
	}
	return errors.Join(errs...)
}

// transfer gives the volume's leadership away and returns how long a write that was begun with it took.
func (b *bench) transfer(to trivet.NodeID) (time.Duration, error) {
	v, err := b.volume()
	if err != nil {
		return 0, err
	}
	r, ok := b.host.Replica(volumeID)
	if !ok || !r.Status().IsLeader {
		return 0, fmt.Errorf("transfer: %s does not lead: %w", b.name, trivet.ErrNotLeader)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	block := make([]byte, trivet.BlockSize)
	if err := v.WriteAt(ctx, block, 0); err != nil { // nothing is to be found out any more
		return 0, err
	}
	began := time.Now()
	if err := r.TransferTo(ctx, replicaOn(to, volumeID)); err != nil {
		return 0, err
	}
	err = v.WriteAt(ctx, block, 0)
	return time.Since(began), err
}

// addIdle starts replicas of further volumes, which nobody uses, until there are n.
func (b *bench) addIdle(n int) error {
	b.mu.Lock()
	where := b.where
	b.mu.Unlock()
	ctx := context.Background()
	for ; b.idleN < n; b.idleN++ {
		id := idleID(b.idleN)
		spec := replication.ReplicaSpec{
			Volume: id, Replica: replicaOn(b.name, id), Disk: b.disk.Replication(),
			SizeBytes: 1 << 30, Members: members(where, id),
		}
		if err := errors.Join(b.host.CreateReplica(ctx, spec), b.host.OpenReplica(ctx, spec)); err != nil {
			return err
		}
	}
	return nil
}

func idleID(i int) trivet.VolumeID { return trivet.VolumeID(1000 + i) }

// led counts the further groups that have a leader.
func (b *bench) led() int {
	n := 0
	for i := range b.idleN {
		if r, ok := b.host.Replica(idleID(i)); ok && r.Status().Leader != "" {
			n++
		}
	}
	return n
}

// spec is this node's replica of the volume, which is far larger than what is written to it. REQUIRES: joined.
func (b *bench) spec() replication.ReplicaSpec {
	b.mu.Lock()
	defer b.mu.Unlock()
	return replication.ReplicaSpec{
		Volume: volumeID, Replica: replicaOn(b.name, volumeID), Disk: b.disk.Replication(),
		SizeBytes: volumeBytes, Members: members(b.where, volumeID),
	}
}

// fill writes so many MiB, one after the other, from the middle of the volume on.
func (b *bench) fill(mib int) error {
	v, err := b.volume()
	if err != nil {
		return err
	}
	chunk := make([]byte, 1<<20)
	fillRandom(chunk)
	for i := range int64(mib) {
		if err := v.WriteAt(context.Background(), chunk, volumeBytes/2+i<<20); err != nil {
			return err
		}
	}
	return nil
}

// replicaOn names the replica of a group on a node the same way in each process.
func replicaOn(n trivet.NodeID, id trivet.VolumeID) trivet.ReplicaID {
	return trivet.ReplicaID(fmt.Sprintf("00000000-0000-4000-8000-%08x000%s", uint64(id), n[1:])) // n1 to n9
}

func members(where map[trivet.NodeID]string, id trivet.VolumeID) []raftgroup.Member {
	var ms []raftgroup.Member
	for _, n := range nodeNames {
		if _, ok := where[n]; ok {
			ms = append(ms, raftgroup.Member{Replica: replicaOn(n, id), Node: n})
		}
	}
	return ms
}

// load does the work, in the process that leads: leadership follows the attachment.
func (b *bench) load(l load) (result, error) {
	if l.What == "entries" {
		template := make([]byte, l.Bytes)
		fillRandom(template)
		return drive(l, func(int, *rand.Rand) error {
			// The group keeps what it is given, so each entry needs bytes of its own, as it does in the batcher.
			entry := append(make([]byte, 0, len(template)), template...)
			_, err := b.group.Propose(context.Background(), entry)
			return err
		})
	}
	v, err := b.volume()
	if err != nil {
		return result{}, err
	}
	blocks := make([][]byte, l.Depth)
	for i := range blocks {
		blocks[i] = make([]byte, l.Bytes)
		fillRandom(blocks[i])
	}
	ctx := context.Background()
	return drive(l, func(i int, rnd *rand.Rand) error {
		off := rnd.Int64N(yardBytes/int64(l.Bytes)) * int64(l.Bytes)
		if err := v.WriteAt(ctx, blocks[i], off); err != nil {
			return err
		}
		return v.Flush(ctx)
	})
}

// fence begins a new epoch of the volume, which this node leads; nothing is attached then.
func (b *bench) fence() (trivet.Epoch, error) {
	if b.vol != nil {
		if err := b.vol.Close(); err != nil {
			return 0, err
		}
		b.vol = nil
	}
	r, ok := b.host.Replica(volumeID)
	if !ok {
		return 0, fmt.Errorf("no replica of %s: %w", volumeID, trivet.ErrNotFound)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	epoch := r.Status().Epoch + 1
	return epoch, r.Fence(ctx, epoch)
}

// attach opens the volume at an epoch.
func (b *bench) attach(epoch trivet.Epoch) (*replication.Volume, error) {
	b.mu.Lock()
	where := b.where
	b.mu.Unlock()
	return replication.OpenVolume(replication.VolumeConfig{
		ID: volumeID, SizeBytes: volumeBytes, Epoch: epoch, Members: members(where, volumeID), Network: b.peers, Host: b.host,
	})
}

// volume opens the volume once, at an epoch of its own.
func (b *bench) volume() (*replication.Volume, error) {
	if b.vol != nil {
		return b.vol, nil
	}
	epoch, err := b.fence()
	if err != nil {
		return nil, err
	}
	b.vol, err = b.attach(epoch)
	return b.vol, err
}

// close gives everything back, in the opposite order.
func (b *bench) close() error {
	var errs []error
	if b.vol != nil {
		errs = append(errs, b.vol.Close())
	}
	if b.group != nil {
		errs = append(errs, b.group.Close())
	}
	if b.host != nil {
		errs = append(errs, b.host.Close())
	}
	if b.peers != nil {
		errs = append(errs, b.peers.Close())
	}
	if b.disk != nil {
		errs = append(errs, b.disk.Close())
	}
	return errors.Join(errs...)
}
