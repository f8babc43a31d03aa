package kube_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
)

const cluster trivet.ClusterID = "0a0a0a0a-0000-4000-8000-00000000000a"

// fakeServers are servers as Bear sees them: which answer, and what a birth does.
type fakeServers struct {
	mu      sync.Mutex
	answers []kube.Answer
	asked   int
	inits   []trivet.NodeID
	init    func(node trivet.NodeID) error
	onAsk   func(asked int)
}

func up(node trivet.NodeID) kube.Answer {
	return kube.Answer{Address: string(node) + ":7400", Node: node, Err: errors.New("no member")}
}

func down(addr string) kube.Answer { return kube.Answer{Address: addr, Err: errors.New("refused")} }

func (f *fakeServers) Ask(context.Context) ([]kube.Answer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	if f.onAsk != nil {
		f.onAsk(f.asked)
	}
	return slices.Clone(f.answers), nil
}

func (f *fakeServers) Init(_ context.Context, address string, node trivet.NodeID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if address != string(node)+":7400" {
		return errors.New("wrong address")
	}
	f.inits = append(f.inits, node)
	if f.init != nil {
		return f.init(node)
	}
	return nil
}

// mapsOf returns a server that has a ConfigMap with these keys.
func mapsOf(t *testing.T, data map[string]string) *apiServer {
	t.Helper()
	s := newAPIServer(t)
	s.setData(data)
	return s
}

func bear(t *testing.T, s *apiServer, f *fakeServers) (kube.Birth, error) {
	t.Helper()
	return kube.Bear(within(t, time.Minute), cluster, s.client(), f, nil)
}

func TestBear(t *testing.T) {
	t.Parallel()
	s := mapsOf(t, map[string]string{"other": "kept"})
	f := &fakeServers{answers: []kube.Answer{down("n0:7400"), up("n2"), up("n1")}}
	f.init = func(node trivet.NodeID) error {
		assert.Equal(t, string(node), s.data()[kube.KeyBirthNode], "the choice is written before anything happens")
		assert.Empty(t, s.data()[kube.KeyBorn])
		return nil
	}
	b, err := bear(t, s, f)
	require.NoError(t, err)
	assert.Equal(t, kube.Birth{Cluster: cluster, Node: "n1", Now: true}, b)
	assert.Equal(t, []trivet.NodeID{"n1"}, f.inits)
	assert.Equal(t, map[string]string{
		"other": "kept", kube.KeyBirthNode: "n1", kube.KeyBorn: string(cluster),
	}, s.data())

	// Born once, no birth is tried any more, whoever answers, and even when nobody does.
	none := &fakeServers{answers: []kube.Answer{up("n2")}}
	b, err = bear(t, s, none)
	require.NoError(t, err)
	assert.Equal(t, kube.Birth{Cluster: cluster, Node: "n1"}, b)
	assert.Empty(t, none.inits)
}

// A member that answers is enough; it is written down too.
func TestBearFindsALivingCluster(t *testing.T) {
	t.Parallel()
	s := mapsOf(t, nil)
	f := &fakeServers{answers: []kube.Answer{up("n1"), {Address: "n2:7400", Node: "n2", Member: true}}}
	b, err := bear(t, s, f)
	require.NoError(t, err)
	assert.Equal(t, kube.Birth{Cluster: cluster, Node: "n2"}, b)
	assert.Empty(t, f.inits)
	assert.Equal(t, map[string]string{kube.KeyBirthNode: "n2", kube.KeyBorn: string(cluster)}, s.data())
}

// A Job that died after it chose is repeated while the chosen node is away: nothing is born elsewhere.
func TestBearStaysWithItsChoice(t *testing.T) {
	t.Parallel()
	s := mapsOf(t, map[string]string{kube.KeyBirthNode: "n3"})
	f := &fakeServers{answers: []kube.Answer{up("n1"), up("n2"), down("n3:7400")}}
	ctx, cancel := context.WithCancel(t.Context())
	f.onAsk = func(asked int) {
		if asked == 3 {
			cancel()
		}
	}
	_, err := kube.Bear(ctx, cluster, s.client(), f, nil)
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	for _, word := range []string{"node n3", kube.KeyBirthNode, kube.ConfigMapName, "lost for good"} {
		require.ErrorContains(t, err, word)
	}
	assert.Empty(t, f.inits)
	assert.Equal(t, map[string]string{kube.KeyBirthNode: "n3"}, s.data())

	f.onAsk = func(int) { f.answers = []kube.Answer{up("n1"), up("n3")} } // it comes back
	b, err := bear(t, s, f)
	require.NoError(t, err)
	assert.Equal(t, trivet.NodeID("n3"), b.Node)
	assert.Equal(t, []trivet.NodeID{"n3"}, f.inits)
}

// Init may do its work and lose the answer; or the node was a member all along.
func TestBearRepeatsInit(t *testing.T) {
	t.Parallel()
	s := mapsOf(t, nil)
	f := &fakeServers{answers: []kube.Answer{up("n1"), up("n2")}}
	f.init = func(trivet.NodeID) error {
		switch len(f.inits) {
		case 1, 2:
			return trivet.ErrUnavailable
		}
		return trivet.ErrExists
	}
	f.onAsk = func(asked int) {
		if asked > 1 {
			f.answers = []kube.Answer{up("n0"), up("n1"), up("n2")} // one that would be chosen now
		}
	}
	b, err := bear(t, s, f)
	require.NoError(t, err)
	assert.Equal(t, kube.Birth{Cluster: cluster, Node: "n1"}, b)
	assert.Equal(t, []trivet.NodeID{"n1", "n1", "n1"}, f.inits)
}

// Jobs that run at once, each of which sees other servers, give birth on one node.
func TestBearRace(t *testing.T) {
	t.Parallel()
	s := mapsOf(t, nil)
	all := []kube.Answer{up("n1"), up("n2"), up("n3"), up("n4")}
	fakes := make([]*fakeServers, len(all))
	var (
		wg    sync.WaitGroup
		start = make(chan struct{})
	)
	for i := range fakes {
		f := &fakeServers{answers: all[i:]}
		f.onAsk = func(asked int) {
			if asked == 1 {
				<-start // so that all have read the ConfigMap when the first writes
			} else {
				f.answers = all
			}
		}
		fakes[i] = f
		wg.Go(func() {
			_, err := bear(t, s, f)
			assert.NoError(t, err)
		})
	}
	close(start)
	wg.Wait()
	chosen := trivet.NodeID(s.data()[kube.KeyBirthNode])
	born := 0
	for _, f := range fakes {
		for _, node := range f.inits {
			assert.Equal(t, chosen, node)
			born++
		}
	}
	assert.Positive(t, born)
}

// The choice of another Job, written between reading and writing, wins.
func TestBearLosesTheChoice(t *testing.T) {
	t.Parallel()
	s := mapsOf(t, nil)
	var once sync.Once
	s.intercept(func(method, _ string) int {
		if method == http.MethodPut {
			once.Do(func() { s.setData(map[string]string{kube.KeyBirthNode: "n2"}) })
		}
		return 0
	})
	f := &fakeServers{answers: []kube.Answer{up("n1"), up("n2")}}
	b, err := bear(t, s, f)
	require.NoError(t, err)
	assert.Equal(t, trivet.NodeID("n2"), b.Node)
	assert.Equal(t, []trivet.NodeID{"n2"}, f.inits)
}

func TestBearRefusesAnotherClusters(t *testing.T) {
	t.Parallel()
	s := mapsOf(t, map[string]string{kube.KeyBorn: "0b0b0b0b-0000-4000-8000-00000000000b"})
	f := &fakeServers{answers: []kube.Answer{up("n1")}}
	_, err := bear(t, s, f)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	assert.Empty(t, f.inits)
}

// One line for each reason to wait, not for each try.
func TestBearLogsChanges(t *testing.T) {
	t.Parallel()
	s := mapsOf(t, nil)
	f := &fakeServers{}
	f.onAsk = func(asked int) {
		switch {
		case asked <= 2:
			f.answers = nil
		case asked <= 4:
			f.answers = []kube.Answer{down("n1:7400")}
		default:
			f.answers = []kube.Answer{up("n1")}
		}
	}
	var out bytes.Buffer
	_, err := kube.Bear(within(t, time.Minute), cluster, s.client(), f, slog.New(slog.NewTextHandler(&out, nil)))
	require.NoError(t, err)
	assert.Equal(t, 2, strings.Count(out.String(), "msg=waiting"), out.String())
	assert.Contains(t, out.String(), "no addresses")
	assert.Contains(t, out.String(), "n1:7400: refused")
}
