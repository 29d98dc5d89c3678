package xds

import (
	"context"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/roostmesh/roost/xds/envoy"
)

// healthService is gRPC's health protocol. Without a service name it tells
// whether proxies are served. Envoys ask it, under an instance's own host name,
// whether that instance's connections are to be closed.
type healthService struct {
	healthpb.UnimplementedHealthServer
	*Server
}

// Check implements the health service.
func (h healthService) Check(ctx context.Context, q *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	if q.GetService() != "" {
		return nil, status.Errorf(codes.NotFound, "there is no service %q", q.GetService())
	}
	name := host(ctx)
	if !envoy.IsDrainName(name) {
		select {
		case <-h.ready:
			if !h.admission.closed.Load() {
				return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}, nil
			}
		default:
		}
		return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_NOT_SERVING}, nil
	}
	select {
	case <-h.ready:
	case <-ctx.Done(): // no answer leaves what Envoy has as it is; any error would not
		return nil, ctx.Err()
	}
	if h.cfg.Closing != nil && h.cfg.Closing(name) {
		return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_NOT_SERVING}, nil
	}
	return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}, nil
}

// host is the host name that was asked for.
func host(ctx context.Context) string {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(":authority"); len(v) > 0 {
		return v[0]
	}
	return ""
}
