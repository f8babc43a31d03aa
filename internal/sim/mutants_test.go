package sim_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// go test ./internal/sim -run TestMutants -mutants -v
//
//nolint:gochecknoglobals // flag of the test binary
var mutants = flag.Bool("mutants", false, "build the product with defences removed, and demand that seeds see it")

const (
	mutantSeeds = 40 // within these the simulator must find a mutant
	mutantBatch = 8  // that run at a time
)

// edit replaces a text, which must be there once, in a file of the product.
type edit struct{ file, old, mutated string }

// mutant is the product without one of its defences.
type mutant struct {
	name    string // the hazard (hazards.md, section 1), or the defect of the library
	what    string
	edits   []edit
	faults  string // classes to draw from
	overlap bool
	writers bool
	reports string // what the failure must say
}

// theMutants are those that seeds must find. DESIGN.md says of others why they cannot.
func theMutants() []mutant {
	const raft = "replication/raftgroup/"
	return []mutant{{
		name: "H8", what: "a lease counts from the receipt of an answer, not from when it was asked for",
		edits: []edit{
			{raft + "pace.go", "acked(p.term, p.to, sent, r.promise, 0)", "acked(p.term, p.to, g.now(), r.promise, 0)"},
			{
				raft + "transport.go", "acked(req.Term, trivet.ReplicaID(id), sent, r.promise, 0)",
				"acked(req.Term, trivet.ReplicaID(id), t.g.now(), r.promise, 0)",
			},
		},
		faults: "depose", reports: "an acknowledged write is lost",
	}, {
		name: "D5", what: "a vote is written in two steps, as the library does it",
		edits: []edit{{
			raft + "stable.go", "\t\ts.voteTerm = v\n\t\ts.mu.Unlock()\n\t\treturn nil\n", `
		s.voteTerm = v
		rec := s.rec
		s.mu.Unlock()
		if rec.candidate == "" {
			return nil
		}
		s.turn <- struct{}{}
		defer func() { <-s.turn }()
		rec.term, rec.voteTerm = max(rec.term, v), v
		return s.write(rec)
`,
		}},
		faults: "crashVote,transfer,takeOver", reports: "who has not stood in it",
	}, {
		name: "H12", what: "a write of a fenced epoch is applied",
		edits: []edit{{
			"replication/core.go", "\tcase epoch < c.epoch:\n\t\treturn outFenced\n\tcase epoch > c.epoch:",
			"\tcase epoch > c.epoch:",
		}},
		faults: "takeOver,transfer,isolate", reports: "outside the session window", // it used up the holder's sequences
	}, {
		name: "I4", what: "a snapshot is taken among the entries that are applied with it",
		edits: []edit{{
			"replication/command.go", "\treturn len(b) > entryHeaderBytes && binary.BigEndian.Uint16(b[2:]) == 1 &&",
			"\treturn len(b) < 0 &&",
		}},
		faults: "snapshot,crash,takeOver", reports: "holds version",
	}, {
		name: "H22", what: "a scrub gives the majority what the minority has",
		edits: []edit{{
			"replication/scrub.go", "if n > (len(values)+absentN)/2 {", "if n <= (len(values)+absentN)/2 {",
		}},
		faults: "flip,transfer", reports: "which was never issued",
	}, {
		name: "I15", what: "a read where two write asks no quorum",
		edits:   []edit{{raft + "round.go", "need := voterN(members) / 2", "need := 0"}},
		writers: true, faults: "depose", reports: "an acknowledged write is lost",
	}, {
		name: "H39", what: "the window of a writer that stays is emptied by the fence of another",
		edits:   []edit{{"replication/writers.go", "next[i] = c.windowOf(i)", "next[i] = newWindow()"}},
		writers: true, faults: "pause,isolate,holdReply", reports: "not linearizable",
	}}
}

// A simulator that finds no bug says nothing. So each mutant must be found within mutantSeeds seeds, for the
// reason that it is wrong, and the seeds that find it must pass without it.
func TestMutants(t *testing.T) {
	if !*mutants {
		t.Skip("run by make sim-mutants: each mutant is a build of its own")
	}
	for _, m := range theMutants() {
		t.Run(strings.ReplaceAll(m.name+" "+m.what, " ", "_"), func(t *testing.T) {
			bin := m.build(t)
			for first := 1; first <= mutantSeeds; first += mutantBatch {
				out, err := m.play(t, bin, first)
				if err == nil {
					continue
				}
				found := failedSeeds(out)
				require.NotEmpty(t, found, "no seed failed, but the run did: %s", out)
				require.Contains(t, out, m.reports, "seeds %v fail for another reason than %q", found, m.reports)
				t.Logf("%s, %s: found by seeds %v of %d to %d", m.name, m.what, found, first, first+mutantBatch-1)
				out, err = m.play(t, os.Args[0], first)
				require.NoError(t, err, "the product itself fails: %s", out)
				return
			}
			require.Fail(t, "not found", "%s, by %d seeds", m.what, mutantSeeds)
		})
	}
}

// build makes a test binary of the mutant, without a change to the tree.
func (m mutant) build(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	root, err := filepath.Abs("../..")
	require.NoError(t, err)
	replace := map[string]string{}
	for i, e := range m.edits {
		path := filepath.Join(root, e.file)
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, 1, strings.Count(string(text), e.old), "%s: where the mutation belongs: %q", e.file, e.old)
		replace[path] = filepath.Join(dir, strconv.Itoa(i)+".go")
		mutated := strings.Replace(string(text), e.old, e.mutated, 1)
		require.NoError(t, os.WriteFile(replace[path], []byte(mutated), 0o600))
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	require.NoError(t, err)
	file, bin := filepath.Join(dir, "overlay.json"), filepath.Join(dir, "sim.test")
	require.NoError(t, os.WriteFile(file, overlay, 0o600))
	out, err := exec.CommandContext(t.Context(), "go", "test", "-overlay", file, "-c", "-o", bin, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	return bin
}

// play runs a batch of seeds.
func (m mutant) play(t *testing.T, bin string, first int) (string, error) {
	t.Helper()
	args := []string{
		"-test.run=^TestSim$", "-test.v", "-test.timeout=10m", "-duration=40s", "-only=" + m.faults,
		fmt.Sprintf("-first=%d", first), fmt.Sprintf("-seeds=%d", mutantBatch), fmt.Sprintf("-overlap=%v", m.overlap),
		fmt.Sprintf("-writers=%v", m.writers),
	}
	out, err := exec.CommandContext(t.Context(), bin, args...).CombinedOutput()
	return string(out), err
}

var failedSeed = regexp.MustCompile(`(?m)^ +--- FAIL: TestSim/seeds/seed=(\d+) `)

// failedSeeds returns the seeds that failed in the output of a run.
func failedSeeds(out string) []string {
	var seeds []string
	for _, m := range failedSeed.FindAllStringSubmatch(out, -1) {
		seeds = append(seeds, m[1])
	}
	return seeds
}
