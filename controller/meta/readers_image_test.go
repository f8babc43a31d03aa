package meta_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// TestImageRefusesReadersThatCannotBe: damage that kept its checksum, or a mistake of ours, opens nothing.
func TestImageRefusesReadersThatCannotBe(t *testing.T) {
	t.Parallel()
	m := attachable(t)
	for _, n := range []int{1, 2} {
		mustApply(t, m, meta.Command{Attach: &meta.Attach{Volume: 1, Node: nodeID(n), Mode: meta.MultiNodeReader}})
	}
	b := mustImage(t, m.State())
	body := string(b[16 : len(b)-4])
	second := strings.Index(body, `"also":[`)
	require.Positive(t, second)
	for want, bad := range map[string]string{
		"attached to n1 twice":      body[:second] + strings.Replace(body[second:], `"node":"n2"`, `"node":"n1"`, 1),
		"n9, which is unknown":      body[:second] + strings.Replace(body[second:], `"node":"n2"`, `"node":"n9"`, 1),
		"at epoch 3 of 1":           body[:second] + strings.Replace(body[second:], `"epoch":1`, `"epoch":3`, 1),
		"beside others as Single":   body[:second] + strings.Replace(body[second:], "MultiNodeReader", "SingleNodeReader", 1),
		"beside none that reads":    strings.Replace(body, "MultiNodeReader", "SingleNodeMultiWriter", 1),
		"1 readers beside none tha": strings.Replace(body, `"readOnly":true,`, "", 1),
	} {
		require.NotEqual(t, body, bad, want)
		_, err := meta.DecodeImage(framed([]byte(bad)))
		require.ErrorIs(t, err, trivet.ErrCorrupt, want)
		require.ErrorContains(t, err, want)
	}
}
