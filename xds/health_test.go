package xds

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// TestHealth: the server itself serves after the first World; an instance's
// connections are to be closed when the control plane says so, and until it
// knows it gives no answer.
func TestHealth(t *testing.T) {
	h := start(t, Config{Closing: func(name string) bool { return name == "drain-a" }})
	check := func(authority, service string) (healthpb.HealthCheckResponse_ServingStatus, error) {
		t.Helper()
		conn, err := grpc.NewClient(h.address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority(authority))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		ctx, cancel := context.WithTimeout(h.ctx, time.Second)
		defer cancel()
		got, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: service})
		return got.GetStatus(), err
	}
	if got, err := check("localhost", ""); err != nil || got != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("before the first World: %v, %v", got, err)
	}
	if _, err := check("drain-a", ""); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("before anything is known: %v", err)
	}
	h.publish("cluster/a@1")
	for authority, want := range map[string]healthpb.HealthCheckResponse_ServingStatus{
		"localhost": healthpb.HealthCheckResponse_SERVING, "drain-a": healthpb.HealthCheckResponse_NOT_SERVING, "drain-b": healthpb.HealthCheckResponse_SERVING,
	} {
		if got, err := check(authority, ""); err != nil || got != want {
			t.Errorf("%s: %v, %v, want %v", authority, got, err, want)
		}
	}
	if _, err := check("localhost", "other"); status.Code(err) != codes.NotFound {
		t.Errorf("an unknown service: %v", err)
	}
}
