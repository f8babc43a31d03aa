package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/trivet-csi/trivet"
)

// probeTimeout bounds how long a Probe waits for a server before it answers "not ready".
const probeTimeout = 2 * time.Second

// ControllerPrefix begins the full names of the methods that a Proxy passes on.
const ControllerPrefix = servicePrefix + "Controller/"

// UpstreamConfig is the gRPC service config of a Proxy's Upstream. Calls go to all addresses of the name
// in turn, so that a server which is up but cut off from the cluster, or no member of it yet, fails one
// try and not all; and a call that is UNAVAILABLE is tried up to four times more, elsewhere, while its
// deadline lasts, for the attacher ends itself if its very first call fails. Every call of the
// controller service may be repeated.
const UpstreamConfig = `{
	"loadBalancingConfig": [{"round_robin": {}}],
	"methodConfig": [{"name": [{}], "retryPolicy": {
		"maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2,
		"retryableStatusCodes": ["UNAVAILABLE"]
	}}]
}`

// ProxyConfig says what a Proxy serves and whom it asks.
type ProxyConfig struct {
	// Endpoint is the socket: unix:// and an absolute path. Required.
	Endpoint string

	// Upstream reaches a server of the cluster, any at any call: each of them offers the controller
	// service, and their answers are linearizable. It should be made with UpstreamConfig. Required; the
	// caller closes it after the Proxy.
	Upstream grpc.ClientConnInterface

	// Version is the vendor version that GetPluginInfo reports. Required.
	Version string

	// StopTimeout bounds how long Close waits for running calls before it cuts them off.
	// Zero means 30 s.
	StopTimeout time.Duration

	// Logger receives one debug record per request and answer, secrets stripped. Nil discards.
	Logger *slog.Logger
}

// Validate returns ErrInvalid naming the first field that is missing or wrong.
func (c *ProxyConfig) Validate() error {
	switch {
	case c.Upstream == nil:
		return fmt.Errorf("config: Upstream is nil: %w", trivet.ErrInvalid)
	case c.Version == "":
		return fmt.Errorf("config: Version is empty: %w", trivet.ErrInvalid)
	case c.StopTimeout < 0:
		return fmt.Errorf("config: StopTimeout %s is negative: %w", c.StopTimeout, trivet.ErrInvalid)
	}
	if _, err := socketPath(c.Endpoint); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	return nil
}

// Proxy offers the Identity, Controller and SnapshotMetadata services to the sidecars of a pod that is no node of the
// cluster. It keeps no state and decides nothing: a controller call goes to a server as it is, and
// its answer comes back as it is. It passes on what the server implements, so a newer server needs
// no newer Proxy. The Node service is not offered.
type Proxy struct{ main *socket }

// OpenProxy makes the socket and serves on it, with the errors of Open. It does not wait for a
// server: until one answers, Probe says "not ready", and calls are UNAVAILABLE.
func OpenProxy(ctx context.Context, cfg ProxyConfig) (*Proxy, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("open csi proxy: %w", err)
	}
	cfg.Logger = orDiscard(cfg.Logger)
	up := upstream{conn: cfg.Upstream}
	g := grpc.NewServer(grpc.ChainUnaryInterceptor(Intercept(cfg.Logger), up.forward),
		grpc.ChainStreamInterceptor(InterceptStream(cfg.Logger), up.forwardStream),
		grpc.MaxConcurrentStreams(streamsMax))
	csi.RegisterIdentityServer(g, &identityServer{version: cfg.Version, ready: up.ready})
	csi.RegisterControllerServer(g, csi.UnimplementedControllerServer{}) // forward stands before it
	csi.RegisterSnapshotMetadataServer(g, csi.UnimplementedSnapshotMetadataServer{})
	csi.RegisterGroupControllerServer(g, csi.UnimplementedGroupControllerServer{})
	main, err := serveSocket(ctx, g, cfg.Endpoint, cfg.StopTimeout, cfg.Logger)
	if err != nil {
		return nil, fmt.Errorf("open csi proxy: %w", err)
	}
	cfg.Logger.InfoContext(ctx, "csi proxy listens", "endpoint", cfg.Endpoint)
	return &Proxy{main: main}, nil
}

// Done is closed when the proxy has stopped serving, asked to or not.
func (p *Proxy) Done() <-chan struct{} { return p.main.done }

// Close is as Server.Close.
func (p *Proxy) Close() error { return p.main.close() }

// upstream passes calls on.
type upstream struct{ conn grpc.ClientConnInterface }

// forward is the interceptor that answers every controller call with the server's answer.
func (u upstream) forward(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler,
) (any, error) {
	if !ForCluster(info.FullMethod) {
		return next(ctx, req)
	}
	reply, err := newReply(info.FullMethod)
	if err != nil {
		return nil, err
	}
	if err := u.conn.Invoke(ctx, info.FullMethod, req, reply); err != nil {
		return nil, notFinal(err)
	}
	return reply, nil
}

// forwardStream is forward for calls whose answer is a stream. It ends without an error only when the server's does:
// who reads it must know that all is there.
func (u upstream) forwardStream(srv any, down grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler,
) error {
	if !strings.HasPrefix(info.FullMethod, MetadataPrefix) {
		return next(srv, down)
	}
	req, err := newMessage(info.FullMethod, protoreflect.MethodDescriptor.Input)
	if err != nil {
		return err
	}
	if err := down.RecvMsg(req); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(down.Context()) // ends the server's stream whatever ends ours
	defer cancel()
	up, err := u.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, info.FullMethod)
	if err != nil {
		return notFinal(err)
	}
	// io.EOF: it has ended already, and RecvMsg says how.
	if err := up.SendMsg(req); err != nil && !errors.Is(err, io.EOF) {
		return notFinal(err)
	}
	if err := up.CloseSend(); err != nil {
		return notFinal(err)
	}
	for {
		reply, err := newReply(info.FullMethod)
		if err != nil {
			return err
		}
		switch err := up.RecvMsg(reply); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return notFinal(err)
		}
		if err := down.SendMsg(reply); err != nil {
			return err
		}
	}
}

// notFinal replaces the codes by which gRPC itself, not a server's handler, says that the call did
// not get through: the orchestrator must take them for "may still be running".
func notFinal(err error) error {
	st := status.Convert(err)
	switch st.Code() {
	case codes.Unauthenticated, codes.PermissionDenied, codes.Unknown:
		return fmt.Errorf("ask a server: %s: %s: %w", st.Code(), st.Message(), trivet.ErrUnavailable)
	default:
		return err
	}
}

// newReply returns an empty message of the type that a method, such as /csi.v1.Controller/CreateVolume,
// answers with.
func newReply(method string) (proto.Message, error) {
	return newMessage(method, protoreflect.MethodDescriptor.Output)
}

// newMessage returns an empty message of a type that which names of a method.
func newMessage(method string, which func(protoreflect.MethodDescriptor) protoreflect.MessageDescriptor,
) (proto.Message, error) {
	name := strings.Replace(strings.TrimPrefix(method, "/"), "/", ".", 1)
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(name))
	if err != nil {
		return nil, fmt.Errorf("method %s: %w", method, err)
	}
	m, ok := d.(protoreflect.MethodDescriptor)
	if !ok {
		return nil, fmt.Errorf("%s is no method: %w", method, trivet.ErrInvalid)
	}
	t, err := protoregistry.GlobalTypes.FindMessageByName(which(m).FullName())
	if err != nil {
		return nil, fmt.Errorf("message of %s: %w", method, err)
	}
	return t.New().Interface(), nil
}

// ready asks a server whether it can serve.
func (u upstream) ready(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	resp, err := csi.NewIdentityClient(u.conn).Probe(ctx, &csi.ProbeRequest{})
	return err == nil && resp.GetReady().GetValue()
}
