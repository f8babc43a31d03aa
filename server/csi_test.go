package server_test

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/driver"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/server"
)

// connect dials a server with the certificate in dir.
func connect(t *testing.T, address, dir string, role pki.Role) *grpc.ClientConn {
	t.Helper()
	creds, err := pki.Open(dir, role, nil)
	require.NoError(t, err)
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(credentials.NewTLS(creds.ClientConfig("", "h2"))))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, conn.Close()) })
	return conn
}

// TestControllerOverTLS: what `trivet csi-controller` does, from the sidecar's socket to a server.
func TestControllerOverTLS(t *testing.T) {
	t.Parallel()
	certs := newCerts(t)
	s := open(t, certs.config("node-1"))
	conn := connect(t, s.Address(), certs.dir(pki.RoleClient, "csi-controller"), pki.RoleClient)
	endpoint := "unix://" + filepath.Join(t.TempDir(), "csi.sock")
	proxy, err := driver.OpenProxy(t.Context(), driver.ProxyConfig{Endpoint: endpoint, Upstream: conn, Version: "1"})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, proxy.Close()) })
	sidecar, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sidecar.Close()) })
	identity, ctrl := csi.NewIdentityClient(sidecar), csi.NewControllerClient(sidecar)

	// Before the birth of the cluster: at once, not when the deadline passes.
	probe, err := identity.Probe(t.Context(), &csi.ProbeRequest{})
	require.NoError(t, err)
	require.False(t, probe.GetReady().GetValue())
	_, err = ctrl.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)

	_, err = api.NewAdminClient(conn).InitCluster(t.Context(), &api.InitClusterRequest{})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		probe, err := identity.Probe(t.Context(), &csi.ProbeRequest{})
		return err == nil && probe.GetReady().GetValue()
	}, time.Minute, 20*time.Millisecond)
	req := &csi.CreateVolumeRequest{
		Name: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: 64 << 20}, Parameters: map[string]string{"replicas": "1"},
		VolumeCapabilities: []*csi.VolumeCapability{{
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		}},
	}
	var created *csi.CreateVolumeResponse
	require.Eventually(t, func() bool { // until the node has told the catalogue of its disk
		created, err = ctrl.CreateVolume(t.Context(), req)
		return err == nil
	}, time.Minute, 20*time.Millisecond)
	got, err := ctrl.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{
		VolumeId: created.GetVolume().GetVolumeId(),
	})
	require.NoError(t, err)
	require.Equal(t, created.GetVolume().GetCapacityBytes(), got.GetVolume().GetCapacityBytes())
	_, err = ctrl.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: created.GetVolume().GetVolumeId()})
	require.NoError(t, err)
}

// TestControllerFindsTheMember: of two servers one is no member of the cluster, and calls go to both in
// turn; still none fails. (The attacher ends itself at the first one that does.)
func TestControllerFindsTheMember(t *testing.T) {
	t.Parallel()
	certs := newCerts(t)
	member, stranger := open(t, certs.config("node-1")), open(t, certs.config("node-2"))
	creds, err := pki.Open(certs.dir(pki.RoleClient, "csi-controller"), pki.RoleClient, nil)
	require.NoError(t, err)
	servers := manual.NewBuilderWithScheme("servers")
	servers.InitialState(resolver.State{Addresses: []resolver.Address{
		{Addr: stranger.Address()}, {Addr: member.Address()},
	}})
	conn, err := grpc.NewClient("servers:///", grpc.WithResolvers(servers),
		grpc.WithDefaultServiceConfig(driver.UpstreamConfig),
		grpc.WithTransportCredentials(credentials.NewTLS(creds.ClientConfig("", "h2"))))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, conn.Close()) })
	direct := connect(t, member.Address(), certs.dir(pki.RoleClient, "admin"), pki.RoleClient)
	_, err = api.NewAdminClient(direct).InitCluster(t.Context(), &api.InitClusterRequest{})
	require.NoError(t, err)
	ask := func() error {
		_, err := csi.NewControllerClient(conn).ControllerGetCapabilities(t.Context(),
			&csi.ControllerGetCapabilitiesRequest{})
		return err
	}
	require.NoError(t, again(t, ask)) // until there is a connection with the member, too
	for range 20 {
		require.NoError(t, ask())
	}
}

// TestControllerRefusesNodes: whoever steals a node's certificate can neither delete a volume nor
// attach one (S4), and the node service is not on the network at all.
func TestControllerRefusesNodes(t *testing.T) {
	t.Parallel()
	certs := newCerts(t)
	s := open(t, certs.config("node-1"))
	node := connect(t, s.Address(), certs.dir(pki.RoleNode, "node-2"), pki.RoleNode)
	_, err := csi.NewControllerClient(node).DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: "v"})
	require.Equal(t, codes.PermissionDenied, status.Code(err), "%v", err)
	client := connect(t, s.Address(), certs.dir(pki.RoleClient, "csi-controller"), pki.RoleClient)
	_, err = csi.NewNodeClient(client).NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	require.Equal(t, codes.Unimplemented, status.Code(err), "%v", err)
}

// TestRegisterNeedsCSI: there is nothing to register without an endpoint.
func TestRegisterNeedsCSI(t *testing.T) {
	t.Parallel()
	cfg := newCerts(t).config("node-1")
	cfg.Register = t.TempDir()
	_, err := server.Open(t.Context(), cfg)
	require.ErrorContains(t, err, "no csi endpoint")
}
