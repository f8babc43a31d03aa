package transport_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

const testKind = transport.KindVolumeWrite

// echo answers with the body it got.
func echo(_ context.Context, _ trivet.NodeID, m transport.Message) (transport.Message, error) {
	return transport.Message{Body: m.Body}, nil
}

// counted returns an echo that counts its runs.
func counted(n *atomic.Int64) transport.Handler {
	return func(ctx context.Context, from trivet.NodeID, m transport.Message) (transport.Message, error) {
		n.Add(1)
		return echo(ctx, from, m)
	}
}

// inMemory runs f within a bubble over a Memory that has nodes a, b and c.
func inMemory(t *testing.T, f func(t *testing.T, hub *transport.Memory)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		hub := transport.NewMemory(1)
		defer func() { require.NoError(t, hub.Close()) }()
		f(t, hub)
	})
}

func call(t *testing.T, n transport.Network, to trivet.NodeID, body string) (string, error) {
	t.Helper()
	reply, err := n.Call(t.Context(), to, transport.Message{Kind: testKind, Group: 7, Body: []byte(body)})
	if err == nil {
		assert.Equal(t, testKind, reply.Kind)
		assert.EqualValues(t, 7, reply.Group)
	}
	return string(reply.Body), err
}

func TestMemoryCall(t *testing.T) {
	inMemory(t, func(t *testing.T, hub *transport.Memory) {
		a, b := hub.Node("a"), hub.Node("b")
		require.Same(t, a, hub.Node("a"))
		var got transport.Message
		var from trivet.NodeID
		b.Handle(testKind, func(_ context.Context, f trivet.NodeID, m transport.Message) (transport.Message, error) {
			got, from = m, f
			return transport.Message{From: m.To, To: m.From, Body: []byte("pong")}, nil
		})
		reply, err := a.Call(t.Context(), "b", transport.Message{
			Kind: testKind, Group: 9, From: "r1", To: "r2", Body: []byte("ping"),
		})
		require.NoError(t, err)
		assert.Equal(t, transport.Message{Kind: testKind, Group: 9, From: "r2", To: "r1", Body: []byte("pong")}, reply)
		assert.Equal(t, transport.Message{Kind: testKind, Group: 9, From: "r1", To: "r2", Body: []byte("ping")}, got)
		assert.EqualValues(t, "a", from)

		_, err = a.Call(t.Context(), "b", transport.Message{Kind: transport.KindMetaRead})
		require.ErrorIs(t, err, trivet.ErrUnavailable, "no handler")
		_, err = a.Call(t.Context(), "nobody", transport.Message{Kind: testKind})
		require.ErrorIs(t, err, trivet.ErrUnavailable, "no such node")
		_, err = a.Call(t.Context(), "b", transport.Message{Kind: testKind, Body: make([]byte, transport.MessageBytesMax)})
		require.ErrorIs(t, err, trivet.ErrInvalid, "too large")
		require.Panics(t, func() { b.Handle(testKind, echo) })
	})
}

// Bodies never alias: not between nodes, not locally, not in the reply.
func TestMemoryBodiesAreCopies(t *testing.T) {
	for _, to := range []trivet.NodeID{"a", "b"} {
		inMemory(t, func(t *testing.T, hub *transport.Memory) {
			hub.SetParanoid(true)
			a := hub.Node("a")
			var kept []byte
			keep := func(_ context.Context, _ trivet.NodeID, m transport.Message) (transport.Message, error) {
				kept = m.Body
				return transport.Message{Body: []byte("reply")}, nil
			}
			hub.Node(to).Handle(testKind, keep)
			sent := []byte("request")
			_, err := a.Call(t.Context(), to, transport.Message{Kind: testKind, Body: sent})
			require.NoError(t, err)
			assert.Equal(t, "request", string(kept), "to %s: the handler owns what it received", to)
			assert.NotEqual(t, "request", string(sent), "to %s: paranoid mode scribbles on the sender's buffer", to)
		})
	}
}

// What the caller does with a reply does not reach the far node.
func TestMemoryRepliesAreCopies(t *testing.T) {
	inMemory(t, func(t *testing.T, hub *transport.Memory) {
		stored := []byte("stored")
		read := func(context.Context, trivet.NodeID, transport.Message) (transport.Message, error) {
			return transport.Message{Body: stored}, nil
		}
		hub.Node("b").Handle(testKind, read)
		reply, err := hub.Node("a").Call(t.Context(), "b", transport.Message{Kind: testKind})
		require.NoError(t, err)
		clear(reply.Body)
		assert.Equal(t, "stored", string(stored))
	})
}

func TestMemoryErrorsCross(t *testing.T) {
	inMemory(t, func(t *testing.T, hub *transport.Memory) {
		a, b := hub.Node("a"), hub.Node("b")
		b.Handle(testKind, func(context.Context, trivet.NodeID, transport.Message) (transport.Message, error) {
			return transport.Message{}, fmt.Errorf("propose: %w", trivet.ErrNotLeader)
		})
		_, err := call(t, a, "b", "x")
		require.ErrorIs(t, err, trivet.ErrNotLeader)
		require.NotErrorIs(t, err, trivet.ErrUnavailable)
		var remote *transport.RemoteError
		require.ErrorAs(t, err, &remote)
		assert.EqualValues(t, "b", remote.Node)
		assert.Equal(t, "propose: not leader", remote.Text)
	})
}

func TestMemoryCutOneWay(t *testing.T) {
	inMemory(t, func(t *testing.T, hub *transport.Memory) {
		a, b := hub.Node("a"), hub.Node("b")
		var ran atomic.Int64
		a.Handle(testKind, counted(&ran))
		b.Handle(testKind, counted(&ran))

		hub.Cut("a", "b")
		began := time.Now()
		_, err := call(t, a, "b", "x")
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		assert.Zero(t, ran.Load(), "the request never arrived")
		assert.Equal(t, 3*time.Second, time.Since(began), "the caller learns after the loss timeout")

		_, err = call(t, b, "a", "x")
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		assert.EqualValues(t, 1, ran.Load(), "the request arrived, the reply was lost")

		hub.Heal("a", "b")
		_, err = call(t, a, "b", "x")
		require.NoError(t, err)
	})
}

// A cut loses what is sent during it and what is on its way when it begins.
func TestMemoryCutAndDelay(t *testing.T) {
	inMemory(t, func(t *testing.T, hub *transport.Memory) {
		a, b := hub.Node("a"), hub.Node("b")
		var ran atomic.Int64
		b.Handle(testKind, counted(&ran))
		hub.SetFaults("a", "b", transport.Faults{Delay: transport.Uniform(time.Second, time.Second)})
		for _, cutFirst := range []bool{true, false} {
			result := make(chan error, 1)
			send := func() {
				go func() {
					_, err := call(t, a, "b", "x")
					result <- err
				}()
				time.Sleep(500 * time.Millisecond)
			}
			if cutFirst {
				hub.Cut("a", "b")
				send()
				hub.Heal("a", "b")
			} else {
				send()
				hub.Cut("a", "b")
			}
			require.ErrorIs(t, <-result, trivet.ErrUnavailable)
			assert.Zero(t, ran.Load(), "cut first: %v", cutFirst)
		}
		hub.HealAll()
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
	})
}

func TestMemoryPartitionBreaksOutstandingCalls(t *testing.T) {
	inMemory(t, func(t *testing.T, hub *transport.Memory) {
		a, b, c := hub.Node("a"), hub.Node("b"), hub.Node("c")
		c.Handle(testKind, echo)
		ended := make(chan struct{})
		b.Handle(testKind, func(ctx context.Context, _ trivet.NodeID, _ transport.Message) (transport.Message, error) {
			<-ctx.Done()
			close(ended)
			return transport.Message{}, ctx.Err()
		})
		result := make(chan error, 1)
		go func() {
			_, err := call(t, a, "b", "x")
			result <- err
		}()
		synctest.Wait()
		hub.Isolate("b")
		time.Sleep(2 * time.Second) // in the bubble's time
		hub.HealAll()
		time.Sleep(time.Minute)
		select {
		case err := <-result:
			require.Fail(t, "a short cut must not break the call", "%v", err)
		default:
		}
		hub.Partition([]trivet.NodeID{"a", "c"}, []trivet.NodeID{"b"})
		require.ErrorIs(t, <-result, trivet.ErrUnavailable)
		<-ended
		_, err := call(t, a, "c", "x")
		require.NoError(t, err, "the same side of the partition")
	})
}

func TestMemoryDown(t *testing.T) {
	inMemory(t, func(t *testing.T, hub *transport.Memory) {
		a, b := hub.Node("a"), hub.Node("b")
		block := func(ctx context.Context, _ trivet.NodeID, _ transport.Message) (transport.Message, error) {
			<-ctx.Done()
			return transport.Message{}, nil
		}
		a.Handle(testKind, block)
		b.Handle(testKind, block)
		results := make(chan error, 2)
		for _, x := range []struct {
			from transport.Network
			to   trivet.NodeID
		}{{a, "b"}, {b, "a"}} {
			go func() {
				_, err := call(t, x.from, x.to, "x")
				results <- err
			}()
		}
		synctest.Wait()
		began := time.Now()
		require.NoError(t, b.Close())
		require.ErrorIs(t, <-results, trivet.ErrUnavailable)
		require.ErrorIs(t, <-results, trivet.ErrUnavailable)
		_, err := call(t, a, "b", "x")
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		_, err = call(t, b, "a", "x")
		require.ErrorIs(t, err, trivet.ErrClosed, "the dead node itself")
		assert.Zero(t, time.Since(began), "all of it at once")

		again := hub.Node("b")
		require.NotSame(t, b, again)
		_, err = call(t, a, "b", "x")
		require.ErrorIs(t, err, trivet.ErrUnavailable, "the new process has no handlers yet")
		again.Handle(testKind, echo)
		require.NoError(t, b.Close(), "closing the dead node again leaves its successor alone")
		_, err = call(t, a, "b", "x")
		require.NoError(t, err)
		hub.Down("b")
		hub.Down("nobody")
		_, err = call(t, a, "b", "x")
		require.ErrorIs(t, err, trivet.ErrUnavailable)
	})
}

// A request on its way to a node that restarts is not for the new process.
func TestMemoryRestartLosesRequestsInFlight(t *testing.T) {
	inMemory(t, func(t *testing.T, hub *transport.Memory) {
		a := hub.Node("a")
		hub.Node("b")
		hub.SetFaults("a", "b", transport.Faults{Delay: transport.Uniform(time.Second, time.Second)})
		result := make(chan error, 1)
		go func() {
			_, err := call(t, a, "b", "x")
			result <- err
		}()
		synctest.Wait()
		hub.Down("b")
		var ran atomic.Int64
		hub.Node("b").Handle(testKind, counted(&ran))
		require.ErrorIs(t, <-result, trivet.ErrUnavailable)
		time.Sleep(time.Minute)
		assert.Zero(t, ran.Load())
	})
}

func TestMemoryCancel(t *testing.T) {
	for _, cut := range []bool{false, true} {
		inMemory(t, func(t *testing.T, hub *transport.Memory) {
			a, b := hub.Node("a"), hub.Node("b")
			ended := make(chan time.Duration, 1)
			began := time.Now()
			b.Handle(testKind, func(ctx context.Context, _ trivet.NodeID, _ transport.Message) (transport.Message, error) {
				<-ctx.Done()
				ended <- time.Since(began)
				return transport.Message{}, ctx.Err()
			})
			ctx, cancel := context.WithCancel(t.Context())
			result := make(chan error, 1)
			go func() {
				_, err := a.Call(ctx, "b", transport.Message{Kind: testKind})
				result <- err
			}()
			synctest.Wait()
			want := time.Duration(0)
			if cut {
				hub.Cut("a", "b")
				want = 3 * time.Second
			}
			cancel()
			require.ErrorIs(t, <-result, context.Canceled)
			assert.Equal(t, want, <-ended, "when the handler learns of it, cut: %v", cut)
			_, err := a.Call(ctx, "b", transport.Message{Kind: testKind})
			require.ErrorIs(t, err, context.Canceled)
		})
	}
}

func TestMemoryHoldAndLose(t *testing.T) {
	inMemory(t, func(t *testing.T, hub *transport.Memory) {
		a, b := hub.Node("a"), hub.Node("b")
		var ran atomic.Int64
		b.Handle(testKind, counted(&ran))
		b.Handle(transport.KindVolumeRead, counted(&ran))
		release := hub.Hold(transport.OfKind(testKind))
		result := make(chan error, 1)
		go func() {
			_, err := call(t, a, "b", "x")
			result <- err
		}()
		time.Sleep(time.Hour)
		assert.Equal(t, 1, hub.Held())
		assert.Zero(t, ran.Load())
		_, err := a.Call(t.Context(), "b", transport.Message{Kind: transport.KindVolumeRead})
		require.NoError(t, err, "another kind passes")
		release()
		release()
		require.NoError(t, <-result)
		assert.Zero(t, hub.Held())
		assert.EqualValues(t, 2, ran.Load())

		stop := hub.Lose(func(e transport.Envelope) bool { return e.Reply && e.To == "a" })
		_, err = call(t, a, "b", "x")
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		assert.EqualValues(t, 3, ran.Load(), "only the reply was lost")
		stop()
		_, err = call(t, a, "b", "x")
		require.NoError(t, err)
	})
}

// A held request goes down with its node.
func TestMemoryHoldAndDown(t *testing.T) {
	inMemory(t, func(t *testing.T, hub *transport.Memory) {
		a := hub.Node("a")
		hub.Node("b")
		defer hub.Hold(transport.OfKind(testKind))()
		result := make(chan error, 1)
		go func() {
			_, err := call(t, a, "b", "x")
			result <- err
		}()
		synctest.Wait()
		hub.Down("b")
		require.ErrorIs(t, <-result, trivet.ErrUnavailable)
		synctest.Wait()
		assert.Zero(t, hub.Held())
	})
}

func TestMemoryChance(t *testing.T) {
	// run returns which of 200 calls failed and how often the handler ran.
	run := func(t *testing.T, seed uint64, f transport.Faults) (failed string, ran int64) {
		synctest.Test(t, func(t *testing.T) {
			hub := transport.NewMemory(seed)
			a, b := hub.Node("a"), hub.Node("b")
			hub.SetLossTimeout(time.Second)
			hub.SetDefaultFaults(f)
			var n atomic.Int64
			b.Handle(testKind, counted(&n))
			for range 200 {
				if _, err := call(t, a, "b", "x"); err != nil {
					failed += "x"
				} else {
					failed += "."
				}
			}
			hub.ClearFaults()
			_, err := call(t, a, "b", "x")
			require.NoError(t, err)
			require.NoError(t, hub.Close())
			ran = n.Load() - 1
		})
		return failed, ran
	}
	lossy := transport.Faults{Drop: 0.2, Delay: transport.Uniform(0, 50*time.Millisecond)}
	failed, ran := run(t, 1, lossy)
	lostN := int64(0)
	for _, c := range failed {
		if c == 'x' {
			lostN++
		}
	}
	assert.InDelta(t, 200*0.36, lostN, 30, "a call fails when request or reply is lost")
	assert.Greater(t, ran, 200-lostN, "some lost only the reply")
	again, _ := run(t, 1, lossy)
	assert.Equal(t, failed, again, "same seed, same fate")
	other, _ := run(t, 2, lossy)
	assert.NotEqual(t, failed, other, "other seed, other fate")

	failed, ran = run(t, 1, transport.Faults{Duplicate: 0.5})
	assert.NotContains(t, failed, "x")
	assert.InDelta(t, 300, ran, 40, "half of the requests arrive twice")
}

// The second delivery of a request must run to its end although the caller has its reply.
func TestMemoryDuplicateIsNotCancelled(t *testing.T) {
	inMemory(t, func(t *testing.T, hub *transport.Memory) {
		a, b := hub.Node("a"), hub.Node("b")
		hub.SetFaults("a", "b", transport.Faults{Duplicate: 1, Delay: transport.Uniform(0, time.Second)})
		errs := make(chan error, 2)
		b.Handle(testKind, func(ctx context.Context, _ trivet.NodeID, m transport.Message) (transport.Message, error) {
			m.Body[0]++
			time.Sleep(time.Minute) // in the bubble's time; the other delivery has answered
			err := ctx.Err()
			if m.Body[0] != 'x'+1 {
				err = errors.Join(err, errors.New("deliveries share a body"))
			}
			errs <- err
			return transport.Message{}, nil
		})
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		require.NoError(t, <-errs)
		require.NoError(t, <-errs)
	})
}

func TestMemoryCloseJoins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := transport.NewMemory(3)
		hub.SetDefaultFaults(transport.Faults{
			Drop: 0.1, Duplicate: 0.3, Delay: transport.Exponential(time.Second, time.Minute),
		})
		ids := []trivet.NodeID{"a", "b", "c"}
		var running atomic.Int64
		block := func(ctx context.Context, _ trivet.NodeID, _ transport.Message) (transport.Message, error) {
			running.Add(1)
			defer running.Add(-1)
			<-ctx.Done()
			return transport.Message{}, ctx.Err()
		}
		for _, id := range ids {
			hub.Node(id).Handle(testKind, block)
		}
		var callers sync.WaitGroup
		for i := range 60 {
			callers.Go(func() {
				_, err := call(t, hub.Node(ids[i%3]), ids[rand.IntN(3)], "x")
				assert.Error(t, err)
			})
		}
		hub.Cut("a", "b")
		time.Sleep(2 * time.Second)
		require.NoError(t, hub.Close())
		assert.Zero(t, running.Load())
		callers.Wait()
		require.NoError(t, hub.Close())
		_, err := call(t, hub.Node("a"), "b", "x")
		require.ErrorIs(t, err, trivet.ErrClosed)
	}) // synctest fails the test when a goroutine is left
}
