package main

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/api"
)

// The wide list has what adds up, or a dash where nobody could say.
func TestUsageTable(t *testing.T) {
	t.Parallel()
	counted := volumeOf(&api.Volume{Name: "v", SizeBytes: 1 << 30, Usage: &api.VolumeUsage{
		UsedBytes: 3 << 20, SnapshotBytes: 2 << 20, OtherBytes: 1 << 20, SharedBytes: 4 << 20, UniqueBytes: 2 << 20,
	}})
	var out bytes.Buffer
	o := &options{output: outputTable}
	volumes := []volumeView{counted, volumeOf(&api.Volume{Name: "w"})}
	require.NoError(t, o.show(&out, volumes, usageTable(volumes)))
	require.Regexp(t, `USED +SNAPSHOTS +SHARED +UNIQUE\n`, out.String())
	require.Regexp(t, `v .* 3Mi +2Mi +4Mi +2Mi\n`, out.String())
	require.Regexp(t, `w .* - +- +- +-\n`, out.String())
	out.Reset()
	counted.Usage.print(&out)
	require.Equal(t, "bytes: used 3Mi + snapshots 2Mi + to be removed 1Mi = unique 2Mi + shared 4Mi\n", out.String())
	volumes[1].Usage.print(&out)
}
