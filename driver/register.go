package driver

import (
	"context"
	"fmt"
	"log/slog"
	"strings"

	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/trivet-csi/trivet"
)

// supportedVersion is of the CSI major version, in the form that kubelet parses
// (pkg/volume/csi/csi_plugin.go, ValidatePlugin).
const supportedVersion = "1.0.0"

// registrationEndpoint is where kubelet finds the registration service: any socket in its
// plugins_registry that does not begin with a dot will do, and this name is the usual one.
func registrationEndpoint(dir string) string {
	return schemeUnix + strings.TrimSuffix(dir, "/") + "/" + trivet.DriverName + "-reg.sock"
}

// register serves kubelet's plugin registration, which the node-driver-registrar would do otherwise.
// Kubelet sees the socket appear, asks GetInfo, calls NodeGetInfo on the CSI socket and says how it
// went; when the socket disappears, it forgets the driver.
func register(ctx context.Context, cfg *Config) (*socket, error) {
	path, err := socketPath(cfg.Endpoint)
	if err != nil {
		return nil, err
	}
	g := grpc.NewServer(grpc.MaxConcurrentStreams(streamsMax))
	registration.RegisterRegistrationServer(g, &registrar{endpoint: path, log: cfg.Logger})
	endpoint := registrationEndpoint(cfg.RegisterDir)
	s, err := serveSocket(ctx, g, endpoint, cfg.StopTimeout, cfg.Logger)
	if err != nil {
		return nil, fmt.Errorf("register with kubelet: %w", err)
	}
	cfg.Logger.InfoContext(ctx, "waiting for kubelet to register the driver", "endpoint", endpoint)
	return s, nil
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
