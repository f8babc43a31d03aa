package driver

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node"
)

// supportedVersion is of the CSI major version, in the form that kubelet parses
// (pkg/volume/csi/csi_plugin.go, ValidatePlugin).
const supportedVersion = "1.0.0"

// registrationEndpoint is where kubelet finds the registration service: any socket in its
// plugins_registry that does not begin with a dot will do, and this name is the usual one.
func registrationEndpoint(dir string) string {
	return schemeUnix + strings.TrimSuffix(dir, "/") + "/" + trivet.DriverName + "-reg.sock"
}

// placeEvery is how often it is looked whether the node stands where kubelet was told.
const placeEvery = 2 * time.Second

// registered is the registration with kubelet.
type registered struct {
	socket *socket
	told   node.Info // what NodeGetInfo answers kubelet, or newer
}

// register serves kubelet's plugin registration, which the node-driver-registrar would do otherwise.
// Kubelet sees the socket appear, asks GetInfo, calls NodeGetInfo on the CSI socket and says how it
// went; when the socket disappears, it forgets the driver.
func register(ctx context.Context, cfg *Config) (*registered, error) {
	path, err := socketPath(cfg.Endpoint)
	if err != nil {
		return nil, err
	}
	told := cfg.Node.Info()
	g := grpc.NewServer(grpc.MaxConcurrentStreams(streamsMax))
	registration.RegisterRegistrationServer(g, &registrar{endpoint: path, log: cfg.Logger})
	endpoint := registrationEndpoint(cfg.RegisterDir)
	s, err := serveSocket(ctx, g, endpoint, cfg.StopTimeout, cfg.Logger)
	if err != nil {
		return nil, fmt.Errorf("register with kubelet: %w", err)
	}
	cfg.Logger.InfoContext(ctx, "waiting for kubelet to register the driver", "endpoint", endpoint, "zone", told.Zone,
		"rack", told.Rack)
	return &registered{socket: s, told: told}, nil
}

// keep registers again whenever the node stands elsewhere: kubelet asks NodeGetInfo for the topology once for each
// socket that appears, and never again. It ends the registration when ctx ends.
func (r *registered) keep(ctx context.Context, cfg *Config) error {
	tick := time.NewTicker(placeEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			if r.socket == nil {
				return nil
			}
			return r.socket.close()
		case <-tick.C:
		}
		now := cfg.Node.Info()
		if r.socket != nil && now.Zone == r.told.Zone && now.Rack == r.told.Rack {
			continue
		}
		if r.socket != nil {
			if err := r.socket.close(); err != nil {
				cfg.Logger.WarnContext(ctx, "end of the registration with kubelet", keyErr, err)
			}
			r.socket = nil
		}
		again, err := register(ctx, cfg)
		if err != nil { // as long as it fails the kubelet knows no driver here
			cfg.Logger.ErrorContext(ctx, "register with kubelet again, where the node stands now", keyErr, err)
			continue
		}
		*r = *again
	}
}

// registrar serves pluginregistration.Registration.
type registrar struct {
	registration.UnimplementedRegistrationServer

	endpoint string // path of the CSI socket, as kubelet sees it
	log      *slog.Logger
}

// GetInfo tells kubelet what this is and where its socket lies.
func (r *registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type: registration.CSIPlugin, Name: trivet.DriverName, Endpoint: r.endpoint,
		SupportedVersions: []string{supportedVersion},
	}, nil
}

// NotifyRegistrationStatus is kubelet's verdict. After a failure kubelet tries again by itself.
func (r *registrar) NotifyRegistrationStatus(ctx context.Context, s *registration.RegistrationStatus,
) (*registration.RegistrationStatusResponse, error) {
	if s.GetPluginRegistered() {
		r.log.InfoContext(ctx, "kubelet registered the driver")
	} else {
		r.log.ErrorContext(ctx, "kubelet did not register the driver and will try again", keyErr, s.GetError())
	}
	return &registration.RegistrationStatusResponse{}, nil
}
