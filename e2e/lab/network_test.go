package lab

import (
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The other nodes reach the API server while a node's cable goes: the address to which they send does not change.
func TestBridgeKeepsItsAddress(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes a network namespace")
	}
	runtime.LockOSThread() // never unlocked: the thread, with its namespace, ends with the test
	require.NoError(t, unix.Unshare(unix.CLONE_NEWNET))
	require.NoError(t, makeBridge(t.Context()))
	address := func() string {
		out, err := output(t.Context(), "ip", "-o", "link", "show", bridgeName)
		require.NoError(t, err)
		_, after, _ := strings.Cut(out, "link/ether ")
		return strings.Fields(after)[0]
	}
	before := address()
	require.NoError(t, ipAll(t.Context(),
		"link add cable address 02:00:00:00:00:01 type veth peer name other", // lower than the bridge's
		"link set cable master "+bridgeName+" up",
	))
	require.Equal(t, before, address())
	require.NoError(t, ip(t.Context(), "link del cable"))
	require.Equal(t, before, address())
}
