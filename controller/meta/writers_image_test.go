package meta_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// TestImageRefusesWritersThatCannotBe: damage that kept its checksum, or a mistake of ours, opens nothing.
func TestImageRefusesWritersThatCannotBe(t *testing.T) {
	t.Parallel()
	m := attachable(t)
	for _, n := range []int{1, 2} {
		mustApply(t, m, meta.Command{Attach: &meta.Attach{Volume: 1, Node: nodeID(n), Mode: meta.MultiNodeMultiWriter}})
	}
	b := mustImage(t, m.State())
	body := string(b[16 : len(b)-4])
	for want, edit := range map[string][2]string{
		"writer 0 since epoch 0 of 2": {`"writer":1`, `"writer":0`},
		"writer 7 since":              {`"writer":1`, `"writer":7`},
		"since epoch 9 of 2":          {`"since":1`, `"since":9`},
		"beside others as MultiNodeReader": {
			`"mode":"MultiNodeMultiWriter","epoch":2,"incarnation":"` + incarnation(2),
			`"mode":"MultiNodeReader","epoch":2,"incarnation":"` + incarnation(2),
		},
		"n3 is leaving": {`"also":`, `"leaving":"n3","also":`},
	} {
		bad := strings.Replace(body, edit[0], edit[1], 1)
		require.NotEqual(t, body, bad, want)
		_, err := meta.DecodeImage(framed([]byte(bad)))
		require.ErrorIs(t, err, trivet.ErrCorrupt, want)
		require.ErrorContains(t, err, want)
	}
}
