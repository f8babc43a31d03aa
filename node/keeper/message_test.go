package keeper

import (
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// golden is a message as version 1 sends it. Servers and keepers of different versions talk to each
// other: if this test fails, the change needs another version number.
const golden = "5456" + "4b50" + "0100" + "0100" + "0000" + "0200" +
	"29000000" + "21804040" + "80000000" + "00001000" + "2a000000" +
	"00e40b5402000000" + "07000000" + "02000000" + "7631"

var goldenMessage = message{
	op: opPut, flags: flagServed, away: 10 * time.Second, count: 7, name: "v1",
	facts: Facts{Minor: 41, Flags: 0x40408021, Flags2: 0x80, MaxWrite: 1 << 20, Connection: 42},
}

func TestMessageGolden(t *testing.T) {
	t.Parallel()
	var b [messageBytes]byte
	goldenMessage.encode(b[:])
	require.Equal(t, golden+strings.Repeat("0", 2*messageBytes-len(golden)), hex.EncodeToString(b[:]))
	m, err := decode(b[:])
	require.NoError(t, err)
	require.Equal(t, goldenMessage, m)
}

func TestDecodeRefuses(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(b []byte) []byte{
		"short":            func(b []byte) []byte { return b[:messageBytes-1] },
		"long":             func(b []byte) []byte { return append(b, 0) },
		"empty":            func([]byte) []byte { return nil },
		"other magic":      func(b []byte) []byte { b[0] = 0; return b },
		"newer version":    func(b []byte) []byte { b[4] = 2; return b },
		"name too long":    func(b []byte) []byte { b[44] = nameBytesMax + 1; return b },
		"vast name":        func(b []byte) []byte { b[47] = 0xff; return b },
		"name missing":     func(b []byte) []byte { b[44] = 0; return b },
		"name is a path":   func(b []byte) []byte { b[48] = '/'; return b },
		"name has control": func(b []byte) []byte { b[48] = 1; return b },
	} {
		b := make([]byte, messageBytes)
		goldenMessage.encode(b)
		_, err := decode(change(b))
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
	}
}

func TestStatusOf(t *testing.T) {
	t.Parallel()
	require.Zero(t, statusOf(nil))
	for _, want := range []error{
		trivet.ErrInvalid, trivet.ErrNotFound, trivet.ErrInUse, trivet.ErrNoSpace, trivet.ErrUnavailable,
	} {
		require.ErrorIs(t, (&message{status: statusOf(want)}).err(), want)
	}
	require.ErrorIs(t, (&message{status: statusOf(errors.New("anything"))}).err(), trivet.ErrUnavailable)
	require.ErrorIs(t, (&message{status: 999}).err(), trivet.ErrUnavailable, "of a newer keeper")
}

// FuzzDecode: whatever the bytes, no panic; what is accepted encodes to an equal message.
func FuzzDecode(f *testing.F) {
	b := make([]byte, messageBytes)
	goldenMessage.encode(b)
	f.Add(b)
	f.Add([]byte(nil))
	list := make([]byte, messageBytes)
	(&message{op: opList}).encode(list)
	f.Add(list)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrInvalid)
			return
		}
		again := make([]byte, messageBytes)
		m.encode(again)
		got, err := decode(again)
		require.NoError(t, err)
		require.Equal(t, m, got)
	})
}
