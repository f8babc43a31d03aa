package blockdev

import (
	"encoding/json"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// Records as the versions of this program wrote them.
const (
	recordV1 = `{"version":1,"name":"v","point":"/r/v/device","loop":3,"bootId":"x","pid":1,"startTick":9}`
	recordV2 = `{"version":2,"kind":"fuse","name":"v","bootId":"x","pid":1,"startTick":9,` +
		`"state":{"point":"/r/v/device","loop":3}}`
)

func TestRecordVersions(t *testing.T) {
	t.Parallel()
	for version, golden := range map[int]string{1: recordV1, 2: recordV2} {
		r, err := decodeRecord([]byte(golden), "v")
		require.NoError(t, err)
		require.Equal(t, version, r.Version)
		require.Equal(t, KindFUSE, r.Kind)
		require.Equal(t, "x", r.BootID)
		require.EqualValues(t, 9, r.StartTick)
		st, err := decodeFuseState(r, "/r/v/device")
		require.NoError(t, err)
		require.Equal(t, 3, st.Loop)
		_, err = decodeFuseState(r, "/r/w/device")
		require.ErrorIs(t, err, trivet.ErrCorrupt, "of another folder")
	}
	for name, c := range map[string]struct {
		b    string
		want error
	}{
		"of a newer program": {`{"version":3,"name":"v"}`, trivet.ErrInvalid},
		"no version":         {`{"name":"v"}`, trivet.ErrInvalid},
		"another's name":     {`{"version":2,"kind":"fuse","name":"w"}`, trivet.ErrCorrupt},
		"unknown kind":       {`{"version":2,"kind":"iscsi","name":"v"}`, trivet.ErrCorrupt},
		"no kind":            {`{"version":2,"name":"v"}`, trivet.ErrCorrupt},
		"no JSON":            {`{`, trivet.ErrCorrupt},
	} {
		_, err := decodeRecord([]byte(c.b), "v")
		require.ErrorIs(t, err, c.want, name)
	}
}

// FuzzDecodeRecord: a record is acted on as root, so only a matching one may pass.
func FuzzDecodeRecord(f *testing.F) {
	f.Add([]byte(recordV1))
	f.Add([]byte(recordV2))
	f.Add([]byte(`{"version":1,"name":"v","point":"/etc","loop":3}`))
	f.Add([]byte(`{"version":2,"kind":"fuse","name":"v","state":{"point":"/etc"}}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeRecord(b, "v")
		if err != nil {
			return
		}
		require.Equal(t, "v", r.Name)
		st, err := decodeFuseState(r, "/r/v/device")
		if err == nil {
			require.Equal(t, "/r/v/device", st.Point)
			require.GreaterOrEqual(t, st.Loop, noLoop)
		}
	})
}

func TestKinds(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]Kind{
		"": KindAuto, "auto": KindAuto, "ublk": KindUblk, "nbd": KindNBD, "fuse": KindFUSE,
	} {
		got, err := ParseKind(in)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	_, err := ParseKind("iscsi")
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "ublk")
	for _, k := range preference {
		if transportOf(k) == nil {
			_, err := choose(k, preference)
			require.ErrorIs(t, err, trivet.ErrUnavailable)
			require.ErrorContains(t, err, string(k))
		}
	}
}

func TestSiteSaves(t *testing.T) {
	t.Parallel()
	dir, err := lockFolder(t.TempDir(), true)
	require.NoError(t, err)
	defer dir.unlock()
	s := site{name: dir.name(), folder: dir}
	require.NoError(t, s.save(KindFUSE, fuseState{Point: "/p", Loop: 7}))
	r, err := dir.read()
	require.NoError(t, err)
	require.Equal(t, KindFUSE, r.Kind)
	var st fuseState
	require.NoError(t, json.Unmarshal(r.State, &st))
	require.Equal(t, fuseState{Point: "/p", Loop: 7}, st)
	_, err = lockFolder(dir.path, false)
	require.ErrorIs(t, err, trivet.ErrInUse)
}

// TestFolderIsFreeBesideAFork: a child that another goroutine starts has all descriptors until it runs its program. The
// folder is free all the same once it is unlocked.
func TestFolderIsFreeBesideAFork(t *testing.T) {
	t.Parallel()
	dir, err := lockFolder(t.TempDir(), true)
	require.NoError(t, err)
	child, err := syscall.Dup(int(dir.lock.Fd())) // the same open file, as in a child
	require.NoError(t, err)
	defer syscall.Close(child) //nolint:errcheck // nothing was written
	dir.unlock()
	again, err := lockFolder(dir.path, false)
	require.NoError(t, err)
	again.unlock()
}

// TestRetryOutlastsAStandstill: a machine that stood still was not patient meanwhile. Who is in use for good is told.
func TestRetryOutlastsAStandstill(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tries, began := 0, time.Now()
		brief := func() (bool, error) {
			if tries++; tries == 2 {
				<-time.After(time.Minute)
			}
			if tries < 10 {
				return true, trivet.ErrInUse
			}
			return false, nil
		}
		require.NoError(t, retry(t.Context(), busyPatience, brief))
		require.Less(t, time.Since(began), time.Minute+busyPatience)
		began = time.Now()
		forGood := func() (bool, error) { return true, trivet.ErrInUse }
		require.ErrorIs(t, retry(t.Context(), busyPatience, forGood), trivet.ErrInUse)
		require.InDelta(t, busyPatience, time.Since(began), float64(retryEvery))
	})
}
