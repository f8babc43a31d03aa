package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/trivet-csi/trivet"
)

// The times of an Elector. A leader that cannot renew stops to lead before anybody else may: electRenew after its
// last renewal, while others wait for electLease. The difference covers clocks that run at different speeds, which
// is all that has to be covered, for nobody compares two machines' clocks
// (k8s.io/client-go/tools/leaderelection/leaderelection.go has the same two and their reasons).
const (
	electLease = 10 * time.Second
	electRenew = 6 * time.Second
	electEvery = 2 * time.Second
)

// Leases are the Leases of a namespace. *API is.
type Leases interface {
	// Lease returns a Lease; ErrNotFound.
	Lease(ctx context.Context, name string) (*coordinationv1.Lease, error)
	// CreateLease makes a Lease that must not exist: ErrExists.
	CreateLease(ctx context.Context, l *coordinationv1.Lease) error
	// UpdateLease replaces a Lease, unless it changed since l was read: ErrPending.
	UpdateLease(ctx context.Context, l *coordinationv1.Lease) error
}

var _ Leases = (*API)(nil)

// Lease implements Leases.
func (a *API) Lease(ctx context.Context, name string) (*coordinationv1.Lease, error) {
	return a.lease(ctx, a.namespace, name)
}

// CreateLease implements Leases.
func (a *API) CreateLease(ctx context.Context, l *coordinationv1.Lease) error {
	err := a.coordination.Post().Namespace(a.namespace).Resource("leases").Body(l).Do(ctx).Error()
	return a.wrap("create Lease", l.Name, err)
}

// UpdateLease implements Leases.
func (a *API) UpdateLease(ctx context.Context, l *coordinationv1.Lease) error {
	err := a.coordination.Put().Namespace(a.namespace).Resource("leases").Name(l.Name).Body(l).Do(ctx).Error()
	return a.wrap("update Lease", l.Name, err)
}

// Elector holds a Lease of a namespace for as long as it can, so that one of several processes leads. What the
// leader does must be harmless when two do it: a process that was stopped for a while finds out late that it
// does not lead any more.
type Elector struct {
	leases   Leases
	name     string
	identity string
	log      *slog.Logger

	mu        sync.Mutex
	until     time.Time // this process leads until then, unless it renews
	seen      string    // resourceVersion of the Lease when it last changed
	changedAt time.Time // when that was seen, by this machine's clock
}

// NewElector returns an Elector for the Lease of that name. The identity must be another one in each process, as
// the name of a pod is. A nil log discards.
func NewElector(leases Leases, name, identity string, log *slog.Logger) *Elector {
	return &Elector{leases: leases, name: name, identity: identity, log: orDiscard(log)}
}

// Leads reports whether this process leads now.
func (e *Elector) Leads() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return time.Now().Before(e.until)
}

// Run seeks the Lease and keeps it until ctx ends, and gives it back then.
func (e *Elector) Run(ctx context.Context) {
	tick := time.NewTicker(electEvery)
	defer tick.Stop()
	for {
		led := e.Leads()
		err := e.try(ctx)
		switch leads := e.Leads(); {
		case leads != led:
			e.log.Info("leadership", "lease", e.name, "identity", e.identity, "leads", leads)
		case err != nil && !errors.Is(err, trivet.ErrPending) && ctx.Err() == nil:
			e.log.Warn("cannot seek or renew the leadership", "lease", e.name, "err", err)
		}
		select {
		case <-ctx.Done():
			e.giveBack(context.WithoutCancel(ctx))
			return
		case <-tick.C:
		}
	}
}

// try acquires or renews the Lease. Without an error this process leads. ErrPending: another one does.
func (e *Elector) try(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, electEvery)
	defer cancel()
	began := time.Now() // the renewal counts from before the call, whenever it took effect
	l, err := e.leases.Lease(ctx, e.name)
	if errors.Is(err, trivet.ErrNotFound) {
		l = &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: e.name}}
		e.claim(l, began)
		return e.won(e.leases.CreateLease(ctx, l), began)
	}
	if err != nil {
		return err
	}
	if holder := e.holder(l, began); holder != "" {
		return fmt.Errorf("lead %s: %s does: %w", e.name, holder, trivet.ErrPending)
	}
	e.claim(l, began)
	return e.won(e.leases.UpdateLease(ctx, l), began)
}

// holder returns who else holds l, or "" when it may be taken: it is ours, nobody's, or has not been renewed for
// the time that it says, as this process has seen it.
func (e *Elector) holder(l *coordinationv1.Lease, now time.Time) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.seen != l.ResourceVersion {
		e.seen, e.changedAt = l.ResourceVersion, now
	}
	holder := value(l.Spec.HolderIdentity)
	lasts := time.Duration(value(l.Spec.LeaseDurationSeconds)) * time.Second
	if holder == e.identity || now.Sub(e.changedAt) >= lasts {
		return ""
	}
	return holder
}

func (e *Elector) claim(l *coordinationv1.Lease, now time.Time) {
	seconds := int32(electLease / time.Second)
	if value(l.Spec.HolderIdentity) != e.identity {
		at := metav1.NewMicroTime(now)
		changes := value(l.Spec.LeaseTransitions) + 1
		l.Spec.AcquireTime, l.Spec.LeaseTransitions = &at, &changes
	}
	renewed := metav1.NewMicroTime(now)
	l.Spec.HolderIdentity, l.Spec.LeaseDurationSeconds, l.Spec.RenewTime = &e.identity, &seconds, &renewed
}

// won notes the outcome of a claim that began at a time.
func (e *Elector) won(err error, began time.Time) error {
	if err != nil {
		if errors.Is(err, trivet.ErrExists) {
			return fmt.Errorf("%w: %w", err, trivet.ErrPending)
		}
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.until = began.Add(electRenew)
	return nil
}

// giveBack lets the next process lead at once. Nothing depends on it.
func (e *Elector) giveBack(ctx context.Context) {
	if !e.Leads() {
		return
	}
	e.mu.Lock()
	e.until = time.Time{}
	e.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, electEvery)
	defer cancel()
	l, err := e.leases.Lease(ctx, e.name)
	if err == nil && value(l.Spec.HolderIdentity) == e.identity {
		l.Spec.HolderIdentity = nil
		err = e.leases.UpdateLease(ctx, l)
	}
	if err != nil {
		e.log.Warn("cannot give the leadership back", "lease", e.name, "err", err)
	}
}

// value returns what p points to, or zero.
func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}
