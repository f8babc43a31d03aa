package lint_test

import (
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/internal/lint"
)

// mayImport is the direction of data: a package may import the packages of this module named
// here, and "." (the vocabulary) always. A package that is missing here fails the test, so that a
// newcomer decides where it stands.
var mayImport = map[string][]string{
	".":                         {},
	"engine":                    {"engine/segment", "internal/procs"},
	"engine/segment":            {},
	"iothrottle":                {},
	"cache":                     {},
	"node/blockdev":             {"node/keeper"},
	"node/keeper":               {},
	"node/overlay":              {},
	"controller/meta":           {},
	"replication/transport":     {},
	"internal/pki":              {},
	"internal/lint":             {},
	"internal/faultdev":         {},
	"internal/faultdev/devtest": {"internal/faultdev"},
	"internal/testutil":         {"api", "internal/pki", "server"},
	"api":                       {},
	"internal/stage":            {},
	"replication/raftgroup":     {"engine/segment", "internal/stage", "replication/transport"},
	"replication": {
		"engine", "engine/segment", "internal/stage", "replication/raftgroup", "replication/transport",
	},
	"controller": {
		"controller/meta", "engine/segment", "replication/raftgroup", "replication/transport",
	},
	"node": {
		"cache", "controller/meta", "engine", "engine/segment", "internal/stage", "iothrottle", "node/blockdev",
		"node/keeper", "node/overlay", "replication",
		"replication/raftgroup", "replication/transport",
	},
	"driver": {"controller", "controller/meta", "node"},
	"server": {
		"api", "cache", "controller", "controller/meta", "driver", "engine", "internal/pki", "internal/stage",
		"iothrottle", "node", "node/blockdev", "node/keeper", "replication", "replication/raftgroup",
		"replication/transport",
	},
	"cmd/trivet": {
		"api", "controller/meta", "driver", "internal/failover", "internal/kube", "internal/nodelabels", "internal/pki",
		"internal/procs",
		"node/blockdev", // the keeper's way to end devices; node/keeper is below blockdev
		"node/keeper", "server",
	},
	"internal/kube":       {"api", "internal/pki"},
	"internal/failover":   {"api", "internal/kube"},
	"internal/nodelabels": {"api", "internal/kube"},
	"internal/sim":        {"engine", "engine/segment", "replication", "replication/raftgroup", "replication/transport"},
	"internal/csicall":    {},
	"internal/demo":       {"api", "internal/csicall", "internal/pki"},
	"internal/chaos":      {"internal/loopdev"},
	"internal/loopdev":    {},
	"internal/procs":      {},
	"internal/vm":         {"internal/vm/plan"},
	"internal/vm/guest":   {"internal/vm/plan"},
	"internal/vm/plan":    {},
	"internal/vm/vmtest":  {"internal/vm"},
	"internal/bench":      {},
	"internal/replbench": {
		"internal/pki", "node", "replication", "replication/raftgroup", "replication/transport",
	},
	"internal/enginebench": {
		"engine", "engine/segment", "internal/procs",
	},
	"deploy":       {},
	"sanity":       {"internal/csicall", "internal/testutil", "server"},
	"sanity/mount": {"sanity"},
	"sanity/block": {"sanity"},
}

// homes says where a third-party library may be used outside tests: it stops at one package, so
// that it can be replaced by changing one package.
var homes = []struct {
	prefix string
	dirs   []string
}{
	{"github.com/hashicorp/", []string{"replication/raftgroup"}},
	{"github.com/cockroachdb/pebble/v2/vfs", []string{
		"controller", "engine", "internal/sim", "node", "replication",
		"replication/raftgroup", "server",
	}},
	{"github.com/cockroachdb/pebble", []string{"engine"}},
	{"github.com/RoaringBitmap/roaring", []string{"engine"}},
	{"github.com/container-storage-interface/", []string{"driver", "internal/demo"}},
	{"github.com/kubernetes-csi/csi-lib-utils", []string{"driver"}},
	{"github.com/kubernetes-csi/csi-test", []string{"sanity"}},
	{"google.golang.org/grpc", []string{
		"api", "cmd/trivet", "driver", "internal/csicall", "internal/demo", "internal/failover", "internal/kube",
		"internal/nodelabels", "internal/testutil", "sanity", "server",
	}},
	{"google.golang.org/protobuf", []string{"api", "cmd/trivet", "driver", "server"}},
	{"github.com/anishathalye/porcupine", []string{"internal/chaos", "internal/sim"}},
	{"github.com/prometheus/", []string{"server"}},
	{"k8s.io/api/", []string{"internal/failover", "internal/kube"}},
	{"k8s.io/apimachinery", []string{"controller", "internal/failover", "internal/kube"}},
	{"k8s.io/client-go", []string{"internal/kube"}},
	{"k8s.io/kubelet", []string{"driver"}},
	{"k8s.io/mount-utils", []string{"node"}},
	{"k8s.io/utils", []string{"node"}},
	{"golang.org/x/sys/unix", []string{
		"cache", "internal/demo", "internal/faultdev", "internal/loopdev", "internal/procs", "internal/vm/guest", "node",
		"node/blockdev", "node/keeper", "node/overlay", "replication/raftgroup", "replication/transport",
	}},
	{"golang.org/x/time/rate", []string{"replication", "replication/raftgroup"}},
	{"github.com/spf13/cobra", []string{"cmd/trivet"}},
	{"github.com/stretchr/testify", []string{"internal/faultdev/devtest", "internal/testutil", "sanity"}},
}

func load(t *testing.T) []lint.File {
	t.Helper()
	if testing.Short() {
		t.Skip("reads all files of the project; make test and make check do")
	}
	files, err := lint.Load("../..")
	require.NoError(t, err)
	require.Greater(t, len(files), 50, "the walk found too little to mean anything")
	return files
}

func TestImportTable(t *testing.T) {
	for _, f := range load(t) {
		allowed, known := mayImport[f.Dir]
		if !known {
			t.Errorf("%s: package %s is not in the import table; add it", f.Path, f.Dir)
			continue
		}
		if f.Test { // a test may reach up, to run its package against the real neighbours
			continue
		}
		for _, spec := range f.AST.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			require.NoError(t, err)
			dir, ours := strings.CutPrefix(path, lint.Module+"/")
			if ours && !slices.Contains(allowed, dir) {
				t.Errorf("%s imports %s: not allowed, data goes down only (see mayImport)", f.Path, dir)
			}
		}
	}
}

func TestThirdPartyHomes(t *testing.T) {
	for _, f := range load(t) {
		if f.Test {
			continue
		}
		for _, spec := range f.AST.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			require.NoError(t, err)
			for _, h := range homes {
				if !strings.HasPrefix(path, h.prefix) {
					continue
				}
				if !slices.Contains(h.dirs, f.Dir) {
					t.Errorf("%s imports %s: its home is %v", f.Path, path, h.dirs)
				}
				break
			}
		}
	}
}

func TestControllerAndNodeStayApart(t *testing.T) {
	for _, f := range load(t) {
		for _, spec := range f.AST.Imports {
			if f.Dir == "controller" && strings.Contains(spec.Path.Value, lint.Module+"/node") ||
				f.Dir == "node" && spec.Path.Value == strconv.Quote(lint.Module+"/controller") {
				t.Errorf("%s imports %s: what one must tell the other travels in the catalogue", f.Path, spec.Path.Value)
			}
		}
	}
}
