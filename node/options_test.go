package node

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/iothrottle"
)

// S9.
func TestMountOptions(t *testing.T) {
	t.Parallel()
	for _, ok := range []string{
		"ro", "noatime", "nosuid", "discard", "commit=5", "allocsize=64k", "errors=remount-ro",
		`context="system_u:object_r:container_file_t:s0:c1,c2"`, "context=system_u:object_r:container_file_t:s0",
	} {
		assert.NoError(t, checkMountOptions([]string{"rw", ok}), ok)
	}
	for _, bad := range []string{
		"", "suid", "dev", "exec", "noatime,suid", "noatime;reboot", "ro\n", "barrier=0", "nobarrier", "data=writeback",
		"errors=continue", "commit=", "commit=5,suid", "commit=-1", "-o", "--bind", "bind", "remount", "loop", "offset=1",
		`context="a",suid`, `context="a"b"`, "context=a,suid", "context=\"a\nb\"", "x-mount.mkdir", "logdev=/dev/sda",
		"journal_path=/dev/sda", "helper=/bin/sh", "ro ",
	} {
		assert.ErrorIs(t, checkMountOptions([]string{bad}), ErrUnsupported, bad)
	}
}

// S7, S8.
func TestCheckPath(t *testing.T) {
	t.Parallel()
	clean, err := checkPath("target", "/a//b/")
	require.NoError(t, err)
	assert.Equal(t, "/a/b", clean)
	for _, bad := range []string{
		"", "/", "//", "/.", "a", "./a", "/a/..", "/a/../b", "/../etc", "/a\x00b", "/a\n", "/a\x7f",
		"/" + strings.Repeat("a", 5000),
	} {
		_, err := checkPath("target", bad)
		assert.ErrorIs(t, err, trivet.ErrInvalid, "%q", bad)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		params map[string]string
		want   iothrottle.Limits
		err    error
	}{
		{"none", nil, iothrottle.Limits{}, nil},
		{
			"both",
			map[string]string{"iopsLimit": "100", "bandwidthLimit": "1048576"},
			iothrottle.Limits{IOPS: 100, BytesPerSec: 1 << 20},
			nil,
		},
		{
			"all",
			map[string]string{
				"iopsLimit": "1", "readIopsLimit": "2", "writeIopsLimit": "3", "burst": "60",
				"bandwidthLimit": "4", "readBandwidthLimit": "5", "writeBandwidthLimit": "6",
			},
			iothrottle.Limits{
				IOPS: 1, ReadIOPS: 2, WriteIOPS: 3, BytesPerSec: 4, ReadBytesPerSec: 5, WriteBytesPerSec: 6, Burst: time.Minute,
			},
			nil,
		},
		{"negative", map[string]string{"iopsLimit": "-1"}, iothrottle.Limits{}, trivet.ErrInvalid},
		{"not canonical", map[string]string{"bandwidthLimit": "1Mi"}, iothrottle.Limits{}, trivet.ErrInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := limitsOf(tt.params)
			require.ErrorIs(t, err, tt.err)
			if tt.err == nil {
				assert.Equal(t, tt.want, got)
			}
		})
	}
}

func TestShares(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		params map[string]string
		want   iothrottle.Share
		err    error
	}{
		{nil, iothrottle.Share{Weight: 50}, nil},
		{map[string]string{"priority": "0", "iopsReservation": "300"}, iothrottle.Share{Reservation: 300}, nil},
		{map[string]string{"priority": "100"}, iothrottle.Share{Weight: 100}, nil},
		{map[string]string{"priority": "high"}, iothrottle.Share{}, trivet.ErrInvalid},
		{map[string]string{"iopsReservation": "-1"}, iothrottle.Share{}, trivet.ErrInvalid},
	} {
		got, err := shareOf(tt.params)
		require.ErrorIs(t, err, tt.err)
		if tt.err == nil {
			assert.Equal(t, tt.want, got)
		}
	}
}

// openTestPath opens a data path over a disk in memory, as attacher.openPath does.
func openTestPath(t *testing.T, v *meta.Volume, with *shared) *path {
	t.Helper()
	all := newCaches(&Config{})
	stages := with.stages.Open(v.ID)
	cached, err := all.open(probeStage(faultdev.NewMem(1<<20), stages, stage.Replication), v, &attached{epoch: 1},
		cacheMeters(stages))
	require.NoError(t, err)
	p, err := stack(all.follow(cached, v, 1), v, with, stages)
	require.NoError(t, err)
	return p
}

// TestPathFollowsTheCatalogue: an open path takes what changed, all or, if it cannot be read, nothing, and leaves
// what it shares with others when it is closed.
func TestPathFollowsTheCatalogue(t *testing.T) {
	t.Parallel()
	with := shared{scheduler: iothrottle.NewScheduler(), stages: stage.NewRegistry()}
	v := &meta.Volume{
		ID: vol, Params: map[string]string{"iopsLimit": "100"}, Attached: &meta.Attachment{Node: "n1", Epoch: 1},
	}
	p := openTestPath(t, v, &with)
	require.Len(t, with.stages.Volumes(), 1)
	v.Params = map[string]string{"writeIopsLimit": "7", "burst": "9", "priority": "80", "iopsReservation": "5"}
	require.NoError(t, p.apply(v))
	wantLimits := iothrottle.Limits{WriteIOPS: 7, Burst: 9 * time.Second}
	wantShare := iothrottle.Share{Weight: 80, Reservation: 5}
	assert.Equal(t, wantLimits, p.throttle.Limits())
	assert.Equal(t, wantShare, p.scheduled.Share())
	v.Params = map[string]string{"writeIopsLimit": "8", "priority": "x"}
	require.ErrorIs(t, p.apply(v), trivet.ErrInvalid)
	assert.Equal(t, wantLimits, p.throttle.Limits())
	assert.Equal(t, wantShare, p.scheduled.Share())
	require.NoError(t, p.WriteAt(t.Context(), make([]byte, 4096), 0))
	for _, s := range []stage.Stage{stage.Write, stage.Throttle, stage.Scheduler, stage.Cache, stage.Replication} {
		assert.EqualValues(t, 1, p.stages.Meter(s).Totals().LeftN, s)
	}
	p.cache.end()
	p.close()
	require.Empty(t, with.stages.Volumes())

	p = openTestPath(t, &meta.Volume{ID: vol, Attached: v.Attached}, &shared{scheduler: with.scheduler})
	require.NoError(t, p.WriteAt(t.Context(), make([]byte, 4096), 0), "nothing is measured")
	p.cache.end()
	p.close()
}

// Reads of an attachment that writes are never older than its own writes.
func TestReadsOf(t *testing.T) {
	t.Parallel()
	for _, reads := range []trivet.ReadConsistency{"", trivet.ReadStrong, trivet.ReadSession, trivet.ReadEventual} {
		v := &meta.Volume{Params: map[string]string{paramReads: string(reads)}, Attached: &meta.Attachment{ReadOnly: true}}
		assert.Equal(t, reads, readsOf(v))
		v.Attached.ReadOnly = false
		if reads == trivet.ReadEventual {
			reads = trivet.ReadSession
		}
		assert.Equal(t, reads, readsOf(v))
	}
}

// H12, S4: what a leader's node lets through on the strength of its copy of the catalogue.
func TestAuthorizer(t *testing.T) {
	t.Parallel()
	cat := newFakeCatalogue()
	cat.addNode(1)
	cat.addNode(2)
	cat.addVolume(vol, 1, nil)
	cat.report(vol, 1, meta.ReplicaReady)
	cat.must(meta.Command{Attach: &meta.Attach{Volume: vol, Node: "n1", Mode: meta.SingleNodeMultiWriter}}) // epoch 1
	cat.must(meta.Command{ReportFence: &meta.ReportFence{Volume: vol, Epoch: 1}})
	allowed := Authorizer(cat)
	require.NoError(t, allowed("n1", vol, 1))
	require.ErrorIs(t, allowed("n2", vol, 1), trivet.ErrFenced, "another node's epoch")
	require.NoError(t, allowed("n2", vol, 2), "granted since, for all we know")
	require.NoError(t, allowed("n2", 99, 1), "a volume that we have not heard of")

	cat.must(meta.Command{Detach: &meta.Detach{Volume: vol}}) // reserves 2
	require.NoError(t, allowed("n1", vol, 1), "not fenced yet")
	require.ErrorIs(t, allowed("n1", vol, 2), trivet.ErrFenced, "the epoch of a detach is nobody's")
	cat.must(meta.Command{ReportFence: &meta.ReportFence{Volume: vol, Epoch: 2}})
	require.ErrorIs(t, allowed("n1", vol, 1), trivet.ErrFenced, "fenced")
}

func TestRecordsOfAnEarlierBootAreForgotten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	recs, err := openRecords(dir, "boot-1")
	require.NoError(t, err)
	rec := recs.get(vol)
	rec.Staged = &staging{Path: "/a"}
	require.NoError(t, recs.put(rec))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "vol-0000000000000008.tmp"), []byte("{"), 0o600))

	same, err := openRecords(dir, "boot-1")
	require.NoError(t, err)
	assert.Equal(t, rec, same.get(vol))
	next, err := openRecords(dir, "boot-2")
	require.NoError(t, err)
	assert.Empty(t, next.list())
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Empty(t, left)

	require.NoError(t, os.WriteFile(filepath.Join(dir, "vol-0000000000000007.json"), []byte("{"), 0o600))
	_, err = openRecords(dir, "boot-2")
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

func FuzzDecodeRecord(f *testing.F) {
	rec := record{
		Version: recordVersion, Boot: "b", Volume: 7, Device: 1794, Staged: &staging{Path: "/s", FSType: "xfs"},
		Published: []publication{{Path: "/t", Mode: meta.SingleNodeReader, Lost: true}},
	}
	b, err := json.Marshal(rec)
	require.NoError(f, err)
	f.Add(b)
	f.Add([]byte(`{"version":1,"volume":7,"staged":{"path":"../etc"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		rec, err := decodeRecord(b)
		if err != nil {
			return
		}
		require.NotZero(t, rec.Volume)
		if rec.Staged != nil {
			require.True(t, filepath.IsAbs(rec.Staged.Path))
		}
		for _, p := range rec.Published {
			require.True(t, filepath.IsAbs(p.Path))
			require.NotContains(t, strings.Split(p.Path, "/"), "..")
		}
	})
}
