package driver_test

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/driver"
	"github.com/trivet-csi/trivet/internal/testutil"
)

// upstream is a server of the cluster as a proxy sees it, on a TCP port without TLS, which is not the
// driver's business.
type upstream struct {
	ctrl *fakeController
	conn *grpc.ClientConn
	grpc *grpc.Server

	changes *fakeChanges

	mu    sync.Mutex
	deny  error // what every call gets instead of an answer
	calls []string
}

func (u *upstream) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler,
) (any, error) {
	u.mu.Lock()
	deny := u.deny
	u.calls = append(u.calls, info.FullMethod)
	u.mu.Unlock()
	if deny != nil {
		return nil, deny
	}
	return next(ctx, req)
}

func newUpstream(t *testing.T) *upstream {
	t.Helper()
	u := &upstream{ctrl: newFakeController(), changes: newFakeChanges()}
	u.grpc = grpc.NewServer(grpc.ChainUnaryInterceptor(u.intercept, driver.Intercept(nil)),
		grpc.StreamInterceptor(driver.InterceptStream(nil)))
	driver.RegisterController(u.grpc, u.ctrl, func() bool { return true }, "9", 0)
	driver.RegisterSnapshotMetadata(u.grpc, u.changes)
	// Not 127.0.0.1: the port of one that has stopped may be another test's there, who answers in its place.
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort(testutil.Loopback(), "0"))
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- u.grpc.Serve(l) }()
	t.Cleanup(func() {
		u.grpc.Stop()
		<-served
	})
	u.conn, err = grpc.NewClient("passthrough:///"+l.Addr().String(),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, u.conn.Close()) })
	return u
}

// openProxy starts a proxy before u and returns a connection to it.
func openProxy(t *testing.T, u *upstream, log *slog.Logger) *grpc.ClientConn {
	t.Helper()
	endpoint := "unix://" + filepath.Join(t.TempDir(), "csi.sock")
	p, err := driver.OpenProxy(t.Context(), driver.ProxyConfig{
		Endpoint: endpoint, Upstream: u.conn, Version: "1.2.3", Logger: log,
	})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, p.Close()) })
	return dial(t, endpoint)
}

func TestProxyPassesControllerCallsOn(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	c := csi.NewControllerClient(openProxy(t, u, nil))

	caps, err := c.ControllerGetCapabilities(t.Context(), &csi.ControllerGetCapabilitiesRequest{})
	require.NoError(t, err)
	require.NotEmpty(t, caps.GetCapabilities())

	made, err := c.CreateVolume(t.Context(), createReq("through-the-proxy"))
	require.NoError(t, err)
	require.Equal(t, createReq("").GetCapacityRange().GetRequiredBytes(), made.GetVolume().GetCapacityBytes())
	list, err := c.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetEntries(), 1)
	require.Equal(t, made.GetVolume().GetVolumeId(), list.GetEntries()[0].GetVolume().GetVolumeId())

	// The server's codes arrive as they are.
	other := createReq("through-the-proxy")
	other.Parameters = map[string]string{"replicas": "1"}
	_, err = c.CreateVolume(t.Context(), other)
	requireCode(t, codes.AlreadyExists, err)
	_, err = c.CreateVolume(t.Context(), &csi.CreateVolumeRequest{})
	requireCode(t, codes.InvalidArgument, err)
	_, err = c.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: "v"})
	requireCode(t, codes.NotFound, err)
	snap, err := c.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{
		Name: "s", SourceVolumeId: made.GetVolume().GetVolumeId(),
	})
	require.NoError(t, err)
	require.True(t, snap.GetSnapshot().GetReadyToUse())
	_, err = c.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: made.GetVolume().GetVolumeId()})
	require.NoError(t, err)
}

func TestProxyOffersNoNodeService(t *testing.T) {
	t.Parallel()
	conn := openProxy(t, newUpstream(t), nil)
	_, err := csi.NewNodeClient(conn).NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	requireCode(t, codes.Unimplemented, err)
}

func TestProxyWithoutServer(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	conn := openProxy(t, u, nil)
	u.grpc.Stop()

	// Not an error: the sidecars wait for "ready", and end themselves at anything else.
	probe, err := csi.NewIdentityClient(conn).Probe(t.Context(), &csi.ProbeRequest{})
	require.NoError(t, err)
	require.False(t, probe.GetReady().GetValue())
	info, err := csi.NewIdentityClient(conn).GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
	require.NoError(t, err)
	require.Equal(t, trivet.DriverName, info.GetName())
	require.Equal(t, "1.2.3", info.GetVendorVersion())
	_, err = csi.NewControllerClient(conn).CreateVolume(t.Context(), createReq("v"))
	requireCode(t, codes.Unavailable, err)
}

// A refusal that is not the handler's says nothing about an earlier try of the same call, which may
// have made the volume: final codes would leak it.
func TestProxyRefusalIsNotFinal(t *testing.T) {
	t.Parallel()
	for _, code := range []codes.Code{codes.PermissionDenied, codes.Unauthenticated, codes.Unknown} {
		t.Run(code.String(), func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			conn := openProxy(t, u, nil)
			u.mu.Lock()
			u.deny = status.Error(code, "no")
			u.mu.Unlock()
			_, err := csi.NewControllerClient(conn).CreateVolume(t.Context(), createReq("v"))
			requireCode(t, codes.Unavailable, err)
			require.ErrorContains(t, err, code.String())
			probe, err := csi.NewIdentityClient(conn).Probe(t.Context(), &csi.ProbeRequest{})
			require.NoError(t, err)
			require.False(t, probe.GetReady().GetValue())
		})
	}
}

func TestProxyKeepsSecretsOutOfTheLog(t *testing.T) {
	t.Parallel()
	var out buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
	conn := openProxy(t, newUpstream(t), log)
	req := createReq("v")
	req.Secrets = map[string]string{"password": "open-sesame"}
	_, err := csi.NewControllerClient(conn).CreateVolume(t.Context(), req)
	require.NoError(t, err)
	require.Contains(t, out.String(), "CreateVolume")
	require.NotContains(t, out.String(), "open-sesame")
}

func TestProxyConfigValidate(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	for name, change := range map[string]func(*driver.ProxyConfig){
		"Upstream":    func(c *driver.ProxyConfig) { c.Upstream = nil },
		"Version":     func(c *driver.ProxyConfig) { c.Version = "" },
		"StopTimeout": func(c *driver.ProxyConfig) { c.StopTimeout = -1 },
		"endpoint":    func(c *driver.ProxyConfig) { c.Endpoint = "csi.sock" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := driver.ProxyConfig{
				Endpoint: "unix://" + filepath.Join(t.TempDir(), "s"), Upstream: u.conn, Version: "1",
			}
			change(&cfg)
			_, err := driver.OpenProxy(t.Context(), cfg)
			require.ErrorIs(t, err, trivet.ErrInvalid)
			require.ErrorContains(t, err, name)
		})
	}
}
