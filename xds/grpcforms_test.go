package xds

import (
	"context"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	sotwclient "github.com/envoyproxy/go-control-plane/pkg/client/sotw/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// everyForm are services and routes with all that a config may say, of which
// gRPC implements a part.
func everyForm(m *mesh, a, b string) {
	shop, ghost := lb.Key{Tenant: "acme", Service: "shop"}, lb.Key{Tenant: "acme", Service: "ghost"}
	to := func(k lb.Key, version string, weight uint32) lb.Target {
		return lb.Target{Service: k, Version: version, Weight: weight}
	}
	only := func(m lb.Match, to ...lb.Target) *lb.RouteSpec {
		return &lb.RouteSpec{Tenant: "acme", Match: m, To: to, Timeout: time.Minute, Retry: &lb.Retry{On: []string{"connect-failure", "503", "internal", "retriable-headers"}, Attempts: 3}}
	}
	is := func(name, value string) []lb.ValueMatch { return []lb.ValueMatch{{Name: name, Exact: value}} }
	not := func(name, value string) []lb.ValueMatch {
		return []lb.ValueMatch{{Name: name, Exact: value, Invert: true}}
	}
	routes := []*lb.RouteSpec{
		only(lb.Match{Headers: is("x-to", "b")}, to(shop, "v2", 1)),
		only(lb.Match{Headers: is("x-to", "split")}, to(shop, "v1", 1), to(shop, "v2", 1), to(ghost, "", 0)),
		only(lb.Match{Headers: is("x-to", "ghost")}, to(shop, "v1", 0), to(ghost, "", 1)),
		only(lb.Match{Headers: append(is("x-to", "not"), not("x-user", "eve")...)}, to(shop, "v2", 1)),
		only(lb.Match{PathRegex: "/none.*", Headers: []lb.ValueMatch{{Name: "x-to", Regex: "b.*"}, {Name: "x-a", Prefix: "b"}, {Name: "x-b"}, {Name: "x-c", Invert: true}}}, to(shop, "v2", 1)),
		only(lb.Match{Path: "/grpc.health.v1.Health/Check", Methods: []string{"GET"}}, to(shop, "v2", 1)),
		only(lb.Match{Path: "/grpc.health.v1.Health/Check", Query: is("q", "1")}, to(shop, "v2", 1)),
		only(lb.Match{PathPrefix: "/grpc.health.v1.Health/", Methods: []string{"GET", "POST"}, Headers: is("x-to", "method")}, to(shop, "v2", 1)),
	}
	for i, r := range routes {
		r.Name = string(rune('a' + i))
	}
	routes[7].Hosts = []string{"shop.acme", "*.example.com"}
	c := *m.in.Config
	c.Routes = routes
	m.in.Config = &c
	one, two := at("acme/shop", "1", a, 1), at("acme/shop", "2", b, 1)
	one.Version, two.Version, two.Zone = "v1", "v2", "z"
	twice := two
	twice.ID = "3" // the same address again, which gRPC refuses
	list := append(m.list, one, two, twice)
	for _, policy := range []string{"ring_hash", "least_request", "random", "maglev"} {
		list = append(list, at("acme/"+name4(policy), "1", a, 2), at("acme/"+name4(policy), "2", b, 1))
	}
	m.acked(m.publish(list...))
}

// maxCalls is the circuit breaker of the services that policySpecs makes.
const maxCalls = 7

// name4 is a service's name for a policy.
func name4(policy string) string { return "by-" + policy[:4] }

func policySpecs() []*lb.ServiceSpec {
	out := []*lb.ServiceSpec{spec("acme", "shop")}
	for _, policy := range []string{"ring_hash", "least_request", "random", "maglev"} {
		s := spec("acme", name4(policy))
		s.Policy, s.OutlierDetection, s.CircuitBreaker = policy, &lb.OutlierDetection{Consecutive5xx: 3, EjectionTime: time.Second}, &lb.CircuitBreaker{MaxRequests: maxCalls}
		out = append(out, s)
	}
	return out
}

// TestGRPCTakesEveryForm: grpc-go refuses nothing of what a config can say, and
// calls go where Envoy would send them.
func TestGRPCTakesEveryForm(t *testing.T) {
	a, _ := grpcServer(t)
	b, _ := grpcServer(t)
	m := newMesh(t, policySpecs()...)
	everyForm(m, a, b)
	dial := m.caller("grpc~acme~web~1")
	shop := dial("shop.acme")
	ctx, cancel := context.WithTimeout(shop.ctx, soon)
	t.Cleanup(cancel)
	for _, c := range []struct {
		headers []string
		want    []string
	}{
		{nil, []string{a, b}},
		{[]string{"x-to", "b"}, []string{b}},
		{[]string{"x-to", "split"}, []string{a, b}},
		{[]string{"x-to", "not"}, []string{b}},
		{[]string{"x-to", "not", "x-user", "bob"}, []string{b}},
		{[]string{"x-to", "not", "x-user", "eve"}, []string{a, b}},
		{[]string{"x-to", "method"}, []string{b}},
	} {
		shop.ctx = metadata.AppendToOutgoingContext(ctx, c.headers...)
		got := shop.met(c.want...).spread(60)
		for _, who := range []string{a, b} {
			if slices.Contains(c.want, who) != (got[who] > 0) {
				t.Errorf("%v: %v, want %v", c.headers, got, c.want)
			}
		}
	}
	shop.ctx = metadata.AppendToOutgoingContext(ctx, "x-to", "ghost")
	shop.fails(codes.Unavailable)
	for _, policy := range []string{"ring_hash", "least_request", "random", "maglev"} {
		got := dial(name4(policy)+".acme").met(a, b).spread(300)
		if n := got[a]; n < 150 || n > 250 || n+got[b] != 300 {
			t.Errorf("%s: 300 calls by weight 2 and 1: %v", policy, got)
		}
	}
	full(dial(name4("random") + ".acme"))
	for _, p := range m.s.Problems() {
		t.Errorf("%+v", p)
	}
}

// soon is shorter than the 15 s for which gRPC waits for what does not come.
const soon = 10 * time.Second

// full has as many streams open as the circuit breaker allows: one call more
// fails at once, until a stream ends.
func full(c *grpcCaller) {
	c.t.Helper()
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	for range maxCalls {
		stream, err := c.client.Watch(ctx, &healthpb.HealthCheckRequest{})
		if err != nil {
			c.t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			c.t.Fatal(err)
		}
	}
	if _, err := c.call(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "max requests") {
		c.t.Errorf("a call beyond the circuit breaker: %v", err)
	}
	cancel()
	if err := untilAnswered(c.ctx, c); err != nil {
		c.t.Error(err)
	}
}

// TestGRPCEjects: an instance that fails every call is left out after a while.
func TestGRPCEjects(t *testing.T) {
	t.Parallel()
	good, _ := grpcServer(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	bad := grpc.NewServer() // it knows no service
	go func() { _ = bad.Serve(l) }()
	t.Cleanup(bad.Stop)
	s := spec("acme", "shop")
	s.OutlierDetection = &lb.OutlierDetection{Consecutive5xx: 3, EjectionTime: time.Minute}
	m := newMesh(t, s)
	m.publish(at("acme/shop", "1", good, 1), at("acme/shop", "2", l.Addr().String(), 1))
	shop := m.caller("grpc~acme~web~1")("shop.acme")
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	failed := 0
	for row := 0; row < 50; row++ {
		if _, err := shop.call(); err != nil {
			row, failed = -1, failed+1
		}
		select {
		case <-tick.C:
		case <-m.ctx.Done():
			t.Fatalf("%d calls have failed, and they still do", failed)
		}
	}
	if failed == 0 {
		t.Error("no call has failed: the broken instance was never asked")
	}
}

// TestControlPlaneClient: go-control-plane's client of the state of the world
// gets all of a type, then each change.
func TestControlPlaneClient(t *testing.T) {
	m := newMesh(t, spec("acme", "shop"), spec("globex", "web"))
	m.publish()
	conn, err := grpc.NewClient(m.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithCancel(m.ctx)
	t.Cleanup(cancel)
	client := sotwclient.NewADSClient(ctx, &corev3.Node{Id: "grpc~acme~web~1"}, envoy.Listener.URL())
	if err := client.InitConnect(conn); err != nil {
		t.Fatal(err)
	}
	fetch := func(want ...string) {
		t.Helper()
		r, err := client.Fetch()
		if err != nil {
			t.Fatal(err)
		}
		if got := listeners(t, r.Resources); !slices.Equal(got, want) {
			t.Errorf("listeners %v, want %v", got, want)
		}
		if err := client.Ack(); err != nil {
			t.Fatal(err)
		}
	}
	fetch("shop.acme", "shop.acme:80", "shop.acme:grpc")
	m.in.Services = append(m.in.Services, spec("acme", "cart"))
	version := m.publish()
	fetch("cart.acme", "cart.acme:80", "cart.acme:grpc", "shop.acme", "shop.acme:80", "shop.acme:grpc")
	m.acked(version)
}

func listeners(t *testing.T, all []*anypb.Any) (names []string) {
	t.Helper()
	for _, a := range all {
		m, err := a.UnmarshalNew()
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, m.(interface{ GetName() string }).GetName())
	}
	return names
}
