package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	voterMaxDefault      = 3
	snapshotBytesDefault = 4 << 20
)

// tellCommit: most of what happens in a cluster is done by agents that read their node's own copy of the catalogue, so
// each step of anything waits until that has the one before.
const tellCommit = 20 * time.Millisecond

// CatalogueConfig says which node's member of the meta group to run, and on what.
type CatalogueConfig struct {
	Node    trivet.NodeID
	Cluster trivet.ClusterID
	Dir     string // the catalogue's own directory; made when missing
	FS      vfs.FS // nil = the operating system's
	Network transport.Network
	Mux     *raftgroup.Mux // of the same Network
	Timing  raftgroup.Timing
	// VoterMax is how many members vote; further ones are learners, which have a copy. 0 = 3.
	VoterMax int
	// SnapshotBytes of log after which the state is written and the log cut. 0 = 4 MiB.
	SnapshotBytes int64
	// LogSegmentBytes is the size of the files of the catalogue's log (log.go), of which there are two or
	// three. It counts when the log is made. 0 = 8 MiB, which takes the largest entry.
	LogSegmentBytes int64
	Logger          *slog.Logger // nil = discard
	// Fatal is told of an I/O error, or of damage that is not of single entries on the disk, and must stop the process.
	// Must be set.
	Fatal func(error)
}

// Validate returns ErrInvalid naming the first bad field.
func (c *CatalogueConfig) Validate() error {
	if err := trivet.ValidateNodeID(string(c.Node)); err != nil {
		return fmt.Errorf("catalogue: node: %w", err)
	}
	if err := trivet.ValidateUUID(string(c.Cluster)); err != nil {
		return fmt.Errorf("catalogue: cluster: %w", err)
	}
	var what string
	switch {
	case c.Dir == "":
		what = "dir is empty"
	case c.Network == nil || c.Mux == nil:
		what = "network or mux is nil"
	case c.Network.Local() != c.Node:
		what = fmt.Sprintf("network is node %s's, not %s's", c.Network.Local(), c.Node)
	case c.Fatal == nil:
		what = "fatal is nil"
	case c.VoterMax < 0 || c.VoterMax > 0 && c.VoterMax%2 == 0:
		what = fmt.Sprintf("%d voters: want an odd number", c.VoterMax)
	case c.SnapshotBytes < 0 || c.LogSegmentBytes < 0:
		what = "snapshot bytes or log segment bytes are negative"
	default:
		return nil
	}
	return fmt.Errorf("catalogue: %s: %w", what, trivet.ErrInvalid)
}

// Catalogue is this node's member of the meta group. It is safe for concurrent use.
//
// A node has three ways in: Bootstrap gives birth to a cluster; Prepare and Open make an empty
// member, which AddMember on any node of the cluster then lets in; Open alone goes on after a
// restart. Before that Local is empty, and Read and Propose return ErrUnavailable when their ctx
// ends.
type Catalogue struct {
	cfg     CatalogueConfig
	log     *slog.Logger
	machine *machine

	openMu  sync.Mutex   // one Bootstrap, Prepare, Open or Close at a time; taken before mu
	metaLog *segment.Log // nil until needed; under openMu

	reopening sync.WaitGroup // of suspect

	mu     sync.Mutex
	group  *raftgroup.Group // nil until open
	opened chan struct{}    // closed when group is set; another one while Recover opens it again
	self   identity         // zero until open
	closed bool
	ended  chan struct{}      // closed by Close
	stop   context.CancelFunc // ends the manager
	done   chan struct{}      // closed when the manager has ended
}

var _ Store = (*Catalogue)(nil)

// NewCatalogue checks cfg and registers the handlers of the meta messages on the Network. It reads
// and starts nothing. REQUIRES: one per Network, before messages may arrive.
func NewCatalogue(cfg CatalogueConfig) (*Catalogue, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.FS == nil {
		cfg.FS = vfs.Default
	}
	if cfg.VoterMax == 0 {
		cfg.VoterMax = voterMaxDefault
	}
	if cfg.SnapshotBytes == 0 {
		cfg.SnapshotBytes = snapshotBytesDefault
	}
	if cfg.LogSegmentBytes == 0 {
		cfg.LogSegmentBytes = logSegmentBytesDefault
	}
	if cfg.Timing.Heartbeat == 0 {
		cfg.Timing.Heartbeat = time.Second // raftgroup's default, which our own waits go by
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Catalogue{
		cfg: cfg, log: cfg.Logger, machine: newMachine(cfg.FS, cfg.Dir), opened: make(chan struct{}),
		ended: make(chan struct{}),
	}
	cfg.Network.Handle(transport.KindMetaPropose, c.handlePropose)
	cfg.Network.Handle(transport.KindMetaRead, c.handleRead)
	return c, nil
}

// Joined reports whether this node is a member of the meta group: its Bootstrap or Prepare was
// finished, in this process or before. False also for a directory that cannot be read; then Open and
// Prepare say why.
func (c *Catalogue) Joined() bool {
	id, err := c.identity()
	if err != nil || id.State != stateMember {
		return false
	}
	ok, err := raftgroup.Exists(c.groupConfig(id))
	return err == nil && ok
}

// Replica returns this node's replica of the meta group, or "" before Joined.
func (c *Catalogue) Replica() trivet.ReplicaID {
	c.mu.Lock()
	id := c.self
	c.mu.Unlock()
	if id.Replica == "" {
		id, _ = c.identity() //nolint:errcheck // zero when there is none
	}
	return id.Replica
}

// Bootstrap gives birth to the cluster: a meta group with this node alone, open when it returns.
// ErrExists when the node is a member already. It may be repeated after an error or a crash.
func (c *Catalogue) Bootstrap(ctx context.Context) error {
	if err := c.bootstrap(ctx); err != nil {
		return fmt.Errorf("bootstrap cluster %s on %s: %w", c.cfg.Cluster, c.cfg.Node, err)
	}
	return nil
}

func (c *Catalogue) bootstrap(ctx context.Context) error {
	c.openMu.Lock()
	defer c.openMu.Unlock()
	id, err := c.identity()
	switch {
	case errors.Is(err, trivet.ErrNotFound):
		if id, err = c.newIdentity(stateBootstrapping); err != nil {
			return err
		}
	case err != nil:
		return err
	case id.State == stateMember:
		return fmt.Errorf("replica %s is a member: %w", id.Replica, trivet.ErrExists)
	}
	cfg, err := c.withLog(id)
	if err != nil {
		return err
	}
	alone := []raftgroup.Member{{Replica: id.Replica, Node: c.cfg.Node}}
	if err := raftgroup.Create(cfg, alone); err != nil {
		return err
	}
	if err := c.start(id); err != nil {
		return err
	}
	init := meta.Command{InitCluster: &meta.InitCluster{Cluster: c.cfg.Cluster, Time: time.Now()}}
	if _, err := c.Propose(ctx, init); err != nil {
		return err
	}
	id.State = stateMember
	return c.writeIdentity(id)
}

// Prepare makes this node an empty member, to be added by AddMember on the cluster, and returns its
// replica. Again: the same replica. ErrExists when a Bootstrap of this node has begun and was not
// finished.
func (c *Catalogue) Prepare(_ context.Context) (trivet.ReplicaID, error) {
	c.openMu.Lock()
	defer c.openMu.Unlock()
	id, err := c.prepare()
	if err != nil {
		return "", fmt.Errorf("prepare catalogue of %s: %w", c.cfg.Node, err)
	}
	return id.Replica, nil
}

func (c *Catalogue) prepare() (identity, error) {
	id, err := c.identity()
	switch {
	case errors.Is(err, trivet.ErrNotFound):
		if id, err = c.newIdentity(stateMember); err != nil {
			return id, err
		}
	case err != nil:
		return id, err
	case id.State == stateBootstrapping:
		return id, fmt.Errorf("a bootstrap was begun and must be finished first: %w", trivet.ErrExists)
	}
	ok, err := raftgroup.Exists(c.groupConfig(id))
	if ok || err != nil {
		return id, err // it may be the one that a bootstrap made, which Create would refuse
	}
	cfg, err := c.withLog(id)
	if err != nil {
		return id, err
	}
	return id, raftgroup.Create(cfg, nil)
}

// Open starts the member that Bootstrap or Prepare made; nil when it runs. ErrNotFound when there is
// none (H10), ErrCorrupt when the directory contradicts itself or is damaged (SetAside). A log with single entries that
// are damaged opens, and takes no part until other members have mended it (Damage).
func (c *Catalogue) Open(_ context.Context) error {
	c.openMu.Lock()
	defer c.openMu.Unlock()
	id, err := c.identity()
	if err == nil && id.State != stateMember {
		err = fmt.Errorf("its bootstrap was not finished: %w", trivet.ErrNotFound)
	}
	if err == nil {
		err = c.start(id)
	}
	if err != nil {
		return fmt.Errorf("open catalogue of %s: %w", c.cfg.Node, err)
	}
	return nil
}

// start opens the group and starts the manager. REQUIRES: openMu.
func (c *Catalogue) start(id identity) error {
	c.mu.Lock()
	running, closed := c.group != nil, c.closed
	c.mu.Unlock()
	switch {
	case closed:
		return trivet.ErrClosed
	case running:
		return nil
	}
	if err := c.machine.load(); err != nil {
		return err
	}
	if have := c.Local().Cluster(); have != "" && have != c.cfg.Cluster {
		return fmt.Errorf("it is of cluster %s, not %s: %w", have, c.cfg.Cluster, trivet.ErrInvalid)
	}
	cfg, err := c.withLog(id)
	if err != nil {
		return err
	}
	return c.run(cfg, id)
}

// run opens the group and starts the manager. REQUIRES: openMu; the machine has its state.
func (c *Catalogue) run(cfg raftgroup.Config, id identity) error {
	group, err := raftgroup.Open(cfg)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background()) //nolint:forbidigo // the manager's lifetime, ended by Close
	c.mu.Lock()
	c.group, c.self, c.stop, c.done = group, id, stop, make(chan struct{})
	close(c.opened)
	c.mu.Unlock()
	go c.manage(ctx, group, c.done)
	return nil
}

// Close stops the member and waits for it. Idempotent.
func (c *Catalogue) Close() error {
	err := c.close()
	c.reopening.Wait()
	return err
}

func (c *Catalogue) close() error {
	c.openMu.Lock()
	defer c.openMu.Unlock()
	c.mu.Lock()
	group, stop, done := c.group, c.stop, c.done
	if !c.closed {
		close(c.ended)
	}
	again := c.closed
	c.closed = true
	c.mu.Unlock()
	if again {
		return nil
	}
	var err error
	if group != nil {
		stop()
		err = group.Close()
		<-done
	}
	if c.metaLog != nil {
		err = errors.Join(err, c.metaLog.Close())
	}
	return err
}

// Local returns this node's copy of the catalogue, which may lag; empty before Open.
func (c *Catalogue) Local() *meta.State { return c.machine.view().state }

// Changed returns a channel that is closed at the next change of Local.
func (c *Catalogue) Changed() <-chan struct{} { return c.machine.changedChan() }

// Leader returns the node that leads the meta group as far as this one knows, or "".
func (c *Catalogue) Leader() trivet.NodeID {
	if g := c.running(); g != nil {
		return g.Status().LeaderNode
	}
	return ""
}

// Roles returns the nodes that are members of the meta group; true for those that vote. Empty while
// this node is no member.
func (c *Catalogue) Roles() map[trivet.NodeID]bool {
	roles := map[trivet.NodeID]bool{}
	if g := c.running(); g != nil {
		for _, m := range g.Status().Members {
			roles[m.Node] = roles[m.Node] || !m.Learner
		}
	}
	return roles
}

// running returns the open group, or nil.
func (c *Catalogue) running() *raftgroup.Group {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	return c.group
}

// groupConfig returns what does without the log; withLog adds it.
func (c *Catalogue) groupConfig(id identity) raftgroup.Config {
	return raftgroup.Config{
		Group: trivet.MetaGroup, Replica: id.Replica, FS: c.cfg.FS, Dir: c.cfg.FS.PathJoin(c.cfg.Dir, raftDir),
		Network: c.cfg.Mux, Machine: c.machine, Timing: c.cfg.Timing, Logger: c.log, Fatal: c.cfg.Fatal,
		IsMember: c.isMember, SnapshotBytes: c.cfg.SnapshotBytes, MendLog: true, Damaged: c.suspect, TellCommit: tellCommit,
	}
}

// isMember says whether a sender that the group's own configuration does not know may replicate to
// this node. A member that was just prepared knows nothing: there the certificate of the cluster
// must do.
func (c *Catalogue) isMember(replica trivet.ReplicaID, node trivet.NodeID) bool {
	s := c.Local()
	if s.Cluster() == "" {
		return true
	}
	n, ok := s.Node(node)
	return ok && n.MetaReplica == replica
}

// identity reads who this member is. ErrNotFound when there is none, ErrInvalid when the directory
// belongs to another node or cluster (H11).
func (c *Catalogue) identity() (identity, error) {
	b, err := readFile(c.cfg.FS, c.cfg.Dir, identityFile)
	if err != nil {
		return identity{}, err
	}
	id, err := decodeIdentity(b)
	if err != nil {
		return identity{}, fmt.Errorf("file %s: %w", identityFile, err)
	}
	if id.Cluster != c.cfg.Cluster || id.Node != c.cfg.Node {
		return identity{}, fmt.Errorf("directory %s is of node %s in cluster %s, this is %s in %s: %w",
			c.cfg.Dir, id.Node, id.Cluster, c.cfg.Node, c.cfg.Cluster, trivet.ErrInvalid)
	}
	return id, nil
}

// newIdentity draws a replica and makes it durable before anything else is.
func (c *Catalogue) newIdentity(state string) (identity, error) {
	fs := c.cfg.FS
	if err := makeDir(fs, c.cfg.Dir); err != nil {
		return identity{}, err
	}
	// A group without an identity is what is left of one: it must not get a new name and vote again.
	for _, name := range []string{raftDir, logDir, snapshotFile} {
		if _, err := fs.Stat(fs.PathJoin(c.cfg.Dir, name)); err == nil {
			return identity{}, fmt.Errorf("%s is there, but no file %s: %w", name, identityFile, trivet.ErrCorrupt)
		}
	}
	id := identity{
		Cluster: c.cfg.Cluster, Node: c.cfg.Node, Replica: trivet.ReplicaID(trivet.NewUUID()), State: state,
	}
	return id, c.writeIdentity(id)
}

func (c *Catalogue) writeIdentity(id identity) error {
	b, err := id.encode()
	if err != nil {
		return err
	}
	return writeFile(c.cfg.FS, c.cfg.Dir, identityFile, b)
}
