package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/controller/meta"
)

// The parameters of a volume that shape its cache. Sizes are canonical: decimal numbers, in bytes.
const (
	paramCacheMode = "cacheMode"   // absent: writeThrough
	paramCacheSize = "cacheSize"   // absent: see cacheOf
	paramReadAhead = "readAhead"   // absent: as much as there is
	paramEviction  = "eviction"    // absent: lru
	paramOrder     = "ioScheduler" // absent: deadline
	paramAdaptive  = "adaptive"    // on or off; absent: off
)

const (
	// cacheBytesDefault is the cache of a volume that says what mode it wants and not how much.
	cacheBytesDefault = 64 << 20
	cacheSuffix       = ".cache"
	// drainTimeout bounds how long the end of an attachment waits for its dirty blocks.
	drainTimeout = 20 * time.Second
	// recoverRetryMin is how long after a failure a volume that has a mapping file is tried again at the start of a
	// node; it doubles up to recoverRetryMax.
	recoverRetryMin = 100 * time.Millisecond
	recoverRetryMax = 10 * time.Second
)

// caches is what a node knows about caching: where the mapping files are, and the memory for all volumes.
type caches struct {
	dir     string // on a tmpfs; "" = none: no volume is writeBack here
	cluster trivet.ClusterID
	pool    *cache.Pool
	log     *slog.Logger
	poke    chan struct{} // a cache has let go of memory that others may take

	deadline time.Duration // of dirty blocks; 0 = the default of package cache
}

func newCaches(cfg *Config) *caches {
	return &caches{
		dir: cfg.CacheDir, cluster: cfg.Cluster, pool: cache.NewPool(cfg.CacheBytes), log: loggerOr(cfg.Logger),
		poke: make(chan struct{}, 1),
	}
}

func (c *caches) path(id trivet.VolumeID) string {
	return filepath.Join(c.dir, id.String()+cacheSuffix)
}

// lock locks the mapping file of a volume that this node is about to open, and decides whose blocks it holds. It
// comes before the epoch is raised: see cache.Locked. nil: this attachment has none.
func (c *caches) lock(v *meta.Volume) (*cache.Locked, error) {
	if c.dir == "" || v.Attached.ReadOnly || sharedWriter(v) {
		return nil, nil //nolint:nilnil // none
	}
	if _, err := os.Lstat(c.path(v.ID)); errors.Is(err, os.ErrNotExist) &&
		v.Params[paramCacheMode] != string(cache.WriteBack) {
		return nil, nil //nolint:nilnil // nothing was left, and nothing is wanted; run makes one when it is
	}
	return c.lockAt(v.ID, v.Attached.Epoch)
}

// lockAt locks and adopts a mapping file, making the directory for it.
func (c *caches) lockAt(id trivet.VolumeID, epoch trivet.Epoch) (*cache.Locked, error) {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	l, err := cache.Lock(c.path(id))
	if err != nil {
		return nil, err
	}
	if err := l.Adopt(c.cluster, id, epoch); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// tidy removes the directories that are empty.
func (c *caches) tidy() {
	if c.dir != "" {
		_ = os.Remove(c.dir) // fails while something is in it, as it should
		_ = os.Remove(filepath.Dir(c.dir))
	}
}

// open puts the cache of v in front of group. The lock of at, if it has one, belongs to the cache then. When a kernel
// device goes on, so does the loss of a write that an earlier process met: whoever uses it has to be told (H14).
// Without an error it returns a Device even for a volume that caches nothing: it may be told to later.
func (c *caches) open(group trivet.Device, v *meta.Volume, at *attached, meters cache.Meters) (*cache.Device, error) {
	want, weight, err := cacheOf(v)
	if err != nil {
		return nil, err
	}
	if want.Mode == cache.WriteBack && at.lock == nil && !v.Attached.ReadOnly {
		c.log.Warn("no cache directory on a tmpfs: a writeBack volume is written through", "volume", v.ID)
	}
	want.Bytes = c.pool.Ask(v.ID, want.Bytes, weight)
	d, err := cache.Open(group, at.lock, cache.Config{
		Cluster: c.cluster, Volume: v.ID, Epoch: at.epoch, Resume: at.goesOn, Settings: want, Deadline: c.deadline,
		Meters: meters, Logger: c.log,
	})
	if err != nil {
		c.pool.Leave(v.ID)
	}
	return d, err
}

// cacheOf returns the cache that v asks for, and its weight in the node's memory.
func cacheOf(v *meta.Volume) (cache.Settings, int, error) {
	if sharedWriter(v) {
		return throughOf(), priorityDefault, nil
	}
	s := cache.Settings{
		Mode: cache.Mode(v.Params[paramCacheMode]), Eviction: cache.Eviction(v.Params[paramEviction]),
		Order: cache.Order(v.Params[paramOrder]), Adaptive: v.Params[paramAdaptive] == "on",
		ReadAheadBytes: cache.ReadAheadMax,
	}
	if s.Mode == "" {
		s.Mode = cache.WriteThrough
	} else {
		s.Bytes = cacheBytesDefault
	}
	weight := int64(priorityDefault)
	for key, to := range map[string]*int64{
		paramCacheSize: &s.Bytes, paramReadAhead: &s.ReadAheadBytes, paramPriority: &weight,
	} {
		text, ok := v.Params[key]
		if !ok || text == "" {
			continue
		}
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < 0 {
			return s, 0, fmt.Errorf("parameter %s=%q: want a decimal number: %w", key, text, trivet.ErrInvalid)
		}
		*to = n
	}
	s.Bytes -= s.Bytes % trivet.BlockSize
	return s, int(max(weight, 1)), s.Validate()
}

// caching is the cache of one open data path; its settings follow the volume's.
type caching struct {
	*cache.Device

	id    trivet.VolumeID
	epoch trivet.Epoch
	all   *caches
	wants chan cache.Settings // the newest that is not in force yet
	last  cache.Settings
	stop  context.CancelFunc
	done  chan struct{}
}

func (c *caches) follow(d *cache.Device, v *meta.Volume, epoch trivet.Epoch) *caching {
	//nolint:forbidigo // the path's own lifetime, ended by end
	ctx, cancel := context.WithCancel(context.Background())
	f := &caching{
		Device: d, id: v.ID, epoch: epoch, all: c, wants: make(chan cache.Settings, 1),
		stop: cancel, done: make(chan struct{}),
	}
	f.last = d.Settings()
	f.wants <- f.last // a table that was taken over may have another size
	go f.run(ctx)
	return f
}

// run puts new settings in force, one after the other: that may have to wait for dirty blocks to be written back, and
// must not hold up other volumes.
func (f *caching) run(ctx context.Context) {
	defer close(f.done)
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-f.wants:
			before := f.Stats()
			err := f.set(ctx, s)
			if err != nil && ctx.Err() == nil {
				f.all.log.Error("a cache keeps its old settings", "volume", f.id, "err", err)
			}
			if err == nil && s.Bytes < before.Bytes {
				f.all.wake()
			}
		}
	}
}

func (f *caching) set(ctx context.Context, s cache.Settings) error {
	if s.Mode == cache.WriteBack && f.all.dir != "" && !f.HasFile() {
		l, err := f.all.lockAt(f.id, f.epoch)
		if err != nil {
			return err
		}
		if err := f.UseFile(ctx, l); err != nil {
			return errors.Join(err, l.Close())
		}
	}
	return f.Set(ctx, s)
}

func (c *caches) wake() {
	select {
	case c.poke <- struct{}{}:
	default:
	}
}

// apply makes the cache follow v's parameters, and its share of the node's memory.
func (f *caching) apply(v *meta.Volume) error {
	s, weight, err := cacheOf(v)
	if err != nil {
		return err
	}
	s.Bytes = f.all.pool.Ask(f.id, s.Bytes, weight)
	if s == f.last {
		return nil
	}
	f.last = s
	select {
	case <-f.wants: // superseded
	default:
	}
	f.wants <- s // has room: nobody else sends
	return nil
}

// end writes back what is dirty and ends the cache. What cannot be written back stays in its file for the next
// attachment; the log says so.
func (f *caching) end() {
	f.stop()
	<-f.done
	//nolint:forbidigo // bounded, and not to be broken off: it is what keeps acknowledged writes
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err := f.Close(ctx); err != nil {
		f.all.log.Error("a cache was not closed cleanly", "volume", f.id, "err", err)
	}
	f.all.pool.Leave(f.id)
	f.all.wake()
}

// left returns the volumes that have a mapping file.
func (c *caches) left() ([]trivet.VolumeID, error) {
	if c.dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(c.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cache: %w", err)
	}
	var ids []trivet.VolumeID
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), cacheSuffix)
		if !ok {
			continue
		}
		if id, err := trivet.ParseVolumeID(name); err == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// empty removes a mapping file that holds nothing which was acknowledged and not written back. drop removes it in
// any case and says what is lost. It reports whether the file is gone. REQUIRES: the volume's keyLock.
func (c *caches) empty(id trivet.VolumeID, drop bool) (bool, error) {
	l, err := cache.Lock(c.path(id))
	if err != nil {
		return false, err
	}
	bytes, err := l.Dirty()
	switch {
	case err != nil:
		return false, errors.Join(err, l.Close())
	case bytes > 0 && !drop:
		return false, l.Close()
	case bytes > 0:
		c.log.Error("dropping acknowledged writes of a process that died: this node does not hold the volume any more",
			"volume", id, "bytes", bytes)
	}
	return true, l.Remove()
}

// recoverCaches writes back what processes before this one have acknowledged and not written back, whether or not
// anybody uses the volumes now.
func (m *mounts) recoverCaches(ctx context.Context) {
	ids, err := m.attacher.caches.left()
	if err != nil {
		m.log.Error("mapping files were not looked for", "err", err)
	}
	for _, id := range ids {
		for retry := recoverRetryMin; ; retry = min(2*retry, recoverRetryMax) {
			err := m.recoverCache(ctx, id)
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return
			}
			// In use: a child of the dead process may hold the lock for a moment, until it has become another program.
			if !errors.Is(err, trivet.ErrUnavailable) && !errors.Is(err, trivet.ErrPending) &&
				!errors.Is(err, trivet.ErrInUse) {
				m.log.Error("a mapping file was left alone", "volume", id, "err", err)
				break
			}
			m.log.Warn("acknowledged writes of the last process are not written back yet", "volume", id, "err", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(retry):
			}
		}
	}
}

func (m *mounts) recoverCache(ctx context.Context, id trivet.VolumeID) error {
	unlock, err := m.ops.try(id)
	if err != nil {
		return err
	}
	defer unlock()
	if m.attacher.get(id) != nil {
		return nil // somebody uses it: what was in the file was taken over
	}
	if gone, err := m.attacher.caches.empty(id, false); err != nil || gone {
		return err
	}
	v, err := m.attacher.holding(ctx, id)
	// Nodes that write beside each other keep nothing back: what is there is of an attachment before.
	if errors.Is(err, trivet.ErrInUse) || errors.Is(err, trivet.ErrNotFound) || err == nil && sharedWriter(v) {
		_, err := m.attacher.caches.empty(id, true)
		return err
	}
	if err != nil {
		return err
	}
	at, err := m.attacher.open(ctx, v)
	if err != nil {
		return err
	}
	if err := at.path.drain(ctx); err != nil {
		return err
	}
	m.log.Info("wrote back what the last process had acknowledged", "volume", id)
	return nil
}
