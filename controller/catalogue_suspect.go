package controller

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// damagedSuffix is of the directory that SetAside leaves.
const damagedSuffix = ".damaged"

// suspect is what the group tells of an entry of its log that it cannot read any more (raftgroup.Config.Damaged). The
// member is closed and opened again, beside everything else: entries that the catalogue has are cut off, any other is
// got from the other members (raftgroup.Config.MendLog). Calls wait meanwhile, as before the first Open. It does not
// block.
func (c *Catalogue) suspect(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.reopening.Go(func() {
		if err := c.reopen(); err != nil && !errors.Is(err, trivet.ErrClosed) {
			c.cfg.Fatal(fmt.Errorf("open the catalogue of %s again after %w: %w", c.cfg.Node, cause, err))
		}
	})
}

func (c *Catalogue) reopen() error {
	if err := c.restart(func(*raftgroup.Config) {}); err != nil {
		return err
	}
	c.log.Warn("the catalogue was opened again: an entry of its log was damaged", "damaged", c.Damaged())
	return nil
}

// restart closes the group and opens it again with what change makes of its configuration. Calls wait meanwhile, as
// before the first Open.
func (c *Catalogue) restart(change func(*raftgroup.Config)) error {
	c.openMu.Lock()
	defer c.openMu.Unlock()
	id, err := c.halt()
	if err != nil {
		return err
	}
	cfg, err := c.withLog(id)
	if err != nil {
		return err
	}
	change(&cfg)
	return c.run(cfg, id)
}

// halt closes the group, and returns whose it was. ErrClosed: none is open. REQUIRES: openMu.
func (c *Catalogue) halt() (identity, error) {
	c.mu.Lock()
	group, stop, done, id := c.group, c.stop, c.done, c.self
	if c.closed || group == nil {
		c.mu.Unlock()
		return id, fmt.Errorf("it is not open: %w", trivet.ErrClosed)
	}
	c.group, c.opened = nil, make(chan struct{})
	c.mu.Unlock()
	stop()
	err := group.Close()
	<-done
	return id, err
}

// Opened reports whether the member runs, or waits to be mended.
func (c *Catalogue) Opened() bool { return c.running() != nil }

// Damaged returns how many entries of its log this member cannot read. Until it has them from other members it neither
// votes nor leads.
func (c *Catalogue) Damaged() int {
	if g := c.running(); g != nil {
		return g.Status().Damaged
	}
	return 0
}

// Damage says what an operator should know of a log that is damaged; "" when it is not.
func (c *Catalogue) Damage() string {
	g := c.running()
	if g == nil {
		return ""
	}
	st := g.Status()
	if st.Damaged == 0 {
		return ""
	}
	others := 0
	for _, m := range st.Members {
		if m.Replica != c.Replica() {
			others++
		}
	}
	what := fmt.Sprintf("%d entries of the catalogue's log on %s are damaged, and it does not vote before it has them "+
		"from another member", st.Damaged, c.cfg.Node)
	advice := "; bring the other members up"
	if others == 0 {
		advice = ", of which there is none"
	}
	return fmt.Sprintf("%s%s. If none can have them any more, `trivet cluster recover --catalogue` goes on without what "+
		"is behind entry %d (of %d)", what, advice, st.WholeIndex, st.LastIndex)
}

// SetAside moves the directory of a member that Open has refused with ErrCorrupt out of the way, so that this node can
// join anew, as another member (Prepare, AddMember): what this one has voted for and acknowledged is not known any
// more, so it must never run again (H10). The directory is kept, as the only one of its kind, for whoever wants to
// look at it. REQUIRES: the cluster has members elsewhere. ErrInUse: this member is open.
func (c *Catalogue) SetAside() error {
	c.openMu.Lock()
	defer c.openMu.Unlock()
	if c.Opened() {
		return fmt.Errorf("set the catalogue of %s aside: it is open: %w", c.cfg.Node, trivet.ErrInUse)
	}
	if c.metaLog != nil {
		if err := c.metaLog.Close(); err != nil {
			c.log.Warn("the log of the damaged catalogue was not closed cleanly", "err", err)
		}
		c.metaLog = nil
	}
	aside := c.cfg.Dir + damagedSuffix
	err := c.cfg.FS.RemoveAll(aside)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err == nil {
		err = c.cfg.FS.Rename(c.cfg.Dir, aside)
	}
	if err == nil {
		err = syncDir(c.cfg.FS, c.cfg.FS.PathDir(c.cfg.Dir))
	}
	if err != nil {
		return fmt.Errorf("set the catalogue of %s aside: %w", c.cfg.Node, err)
	}
	c.machine.forget()
	c.log.Error("the catalogue of this node was damaged and set aside: it joins anew", "dir", aside)
	return nil
}
