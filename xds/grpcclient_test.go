package xds

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	grpcxds "google.golang.org/grpc/xds"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
	"github.com/roostmesh/roost/xds/proxyless"
)

// mesh is a Server with Worlds of real Snapshots, and gRPC's own client.
type mesh struct {
	*harness
	in       lb.Input
	list     []discovery.Instance
	snapshot *lb.Snapshot
	world    *envoy.Translation
}

func newMesh(t *testing.T, services ...*lb.ServiceSpec) *mesh {
	t.Helper()
	m := &mesh{harness: start(t, Config{})}
	m.in = lb.Input{Config: &lb.Config{Domain: "roost", Node: "h1"}, Services: services, Addresses: map[lb.Key]lb.Addresses{}}
	for i, s := range services {
		m.in.Addresses[s.Key] = lb.Addresses{Internal: netip.AddrFrom4([4]byte{127, 128, 0, byte(i + 1)})}
	}
	return m
}

func spec(tenant, service string) *lb.ServiceSpec {
	return &lb.ServiceSpec{Key: lb.Key{Tenant: tenant, Service: service}, Ports: []lb.PortSpec{{Name: "grpc", Port: 80, Protocol: lb.GRPC}}}
}

// publish makes the next World of the instances and returns its version.
func (m *mesh) publish(list ...discovery.Instance) uint64 {
	m.list, m.in.Catalog = list, discovery.NewCatalog(list)
	m.snapshot = lb.Build(m.snapshot, m.in)
	next := envoy.Translate(m.world, m.snapshot, nil)
	change := next.Since(m.world)
	m.world = next
	m.s.Publish(next, change)
	return next.Version()
}

func at(service, id, address string, weight uint32) discovery.Instance {
	a := netip.MustParseAddrPort(address)
	tenant, name, _ := strings.Cut(service, "/")
	return discovery.Instance{ID: id, Node: "h1", Key: lb.Key{Tenant: tenant, Service: name}, Address: a.Addr(), Ports: []discovery.Port{{Number: a.Port()}}, Weight: weight, Health: discovery.Passing}
}

// grpcServer answers health checks at the address that it returns.
func grpcServer(t *testing.T) (address string, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	healthpb.RegisterHealthServer(s, health.NewServer())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = s.Serve(l) // ends with Stop
	}()
	t.Cleanup(func() {
		s.Stop()
		<-ended
	})
	return l.Addr().String(), s.GracefulStop
}

// caller is an application that dials targets through gRPC's xDS resolver.
func (m *mesh) caller(id string) func(target string) *grpcCaller {
	m.t.Helper()
	identity, err := lb.ParseIdentity(id)
	if err != nil {
		m.t.Fatal(err)
	}
	bootstrap, err := proxyless.Bootstrap(identity, m.address)
	if err != nil {
		m.t.Fatal(err)
	}
	resolver, err := grpcxds.NewXDSResolverWithConfigForTesting(bootstrap)
	if err != nil {
		m.t.Fatal(err)
	}
	return func(target string) *grpcCaller {
		m.t.Helper()
		conn, err := grpc.NewClient("xds:///"+target, grpc.WithResolvers(resolver), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			m.t.Fatal(err)
		}
		m.t.Cleanup(func() { _ = conn.Close() })
		return &grpcCaller{m.t, m.ctx, healthpb.NewHealthClient(conn)}
	}
}

type grpcCaller struct {
	t      *testing.T
	ctx    context.Context
	client healthpb.HealthClient
}

// call makes one call and tells who has answered.
func (c *grpcCaller) call() (string, error) {
	var p peer.Peer
	_, err := c.client.Check(c.ctx, &healthpb.HealthCheckRequest{}, grpc.Peer(&p))
	if err != nil {
		return "", err
	}
	return p.Addr.String(), nil
}

// met calls until each of some instances has answered: a client begins with the
// first one that it has connected to.
func (c *grpcCaller) met(servers ...string) *grpcCaller {
	c.t.Helper()
	for seen := map[string]bool{}; len(seen) < len(servers); {
		who, err := c.call()
		if err != nil {
			c.t.Fatalf("a call failed: %v", err)
		}
		if slices.Contains(servers, who) {
			seen[who] = true
		}
	}
	return c
}

// spread makes n calls, none of which may fail, and counts who answered.
func (c *grpcCaller) spread(n int) map[string]int {
	c.t.Helper()
	got := map[string]int{}
	for range n {
		who, err := c.call()
		if err != nil {
			c.t.Fatalf("a call failed: %v", err)
		}
		got[who]++
	}
	return got
}

// only calls until one instance alone has answered many calls in a row; no call
// may fail meanwhile.
func (c *grpcCaller) only(want string) {
	c.t.Helper()
	for row := 0; row < 50; row++ {
		who, err := c.call()
		if err != nil {
			c.t.Fatalf("a call failed: %v", err)
		}
		if who != want {
			row = -1
		}
	}
}

// fails calls until a call fails with a code.
func (c *grpcCaller) fails(code codes.Code) {
	c.t.Helper()
	for {
		_, err := c.call()
		switch {
		case status.Code(err) == code:
			return
		case err != nil:
			c.t.Fatalf("a call failed: %v", err)
		}
	}
}

// TestGRPCClient: grpc-go's own client reaches a service by weight, leaves an
// instance that drains, follows one that moves, and recovers when a service
// without an instance gets one.
func TestGRPCClient(t *testing.T) {
	a, stopA := grpcServer(t)
	b, _ := grpcServer(t)
	c, _ := grpcServer(t)
	m := newMesh(t, spec("acme", "shop"), spec("acme", "empty"))
	m.publish(at("acme/shop", "1", a, 1), at("acme/shop", "2", b, 3))
	dial := m.caller("grpc~acme~web~1@h1")
	shop := dial("shop.acme")
	got := shop.met(a, b).spread(400)
	if n := got[b]; n < 250 || n > 350 || got[a]+n != 400 {
		t.Errorf("400 calls by weight 1 and 3: %v", got)
	}
	for _, target := range []string{"shop.acme:80", "shop.acme:grpc"} {
		if got := dial(target).met(a, b).spread(20); got[a] == 0 || got[b] == 0 {
			t.Errorf("%s: %v", target, got)
		}
	}

	key := lb.Key{Tenant: "acme", Service: "shop"}
	m.in.Drains = map[lb.Key]map[string]lb.Drain{key: {"acme/shop/1@h1": lb.Draining}}
	m.acked(m.publish(m.list...))
	shop.only(b)
	m.in.Drains = nil
	m.publish(at("acme/shop", "1", c, 1))
	shop.only(c)
	stopA()

	empty := dial("empty.acme")
	empty.fails(codes.Unavailable)
	m.publish()
	shop.fails(codes.Unavailable)
	m.publish(at("acme/shop", "1", b, 1), at("acme/empty", "1", b, 1))
	for _, caller := range []*grpcCaller{shop, empty} {
		if err := untilAnswered(m.ctx, caller); err != nil {
			t.Error(err)
		}
		caller.only(b)
	}
	seenAs(m)
}

// seenAs: every name that is dialled has a stream of its own, all of one id.
func seenAs(m *mesh) {
	m.t.Helper()
	var ids []string
	for _, p := range m.s.Proxies() {
		ids = append(ids, p.ID)
		if p.Identity.Role != lb.Proxyless || len(p.Rejected) > 0 || !p.Connected {
			m.t.Errorf("proxy %+v", p)
		}
		for _, typ := range []envoy.Type{envoy.Listener, envoy.Route, envoy.Cluster, envoy.Endpoint} {
			if p.Types[typ] != (TypeStatus{Sent: 1, Acked: 1}) {
				m.t.Errorf("%s: %s %+v", p.ID, typ, p.Types[typ])
			}
		}
	}
	want := "[grpc~acme~web~1@h1 grpc~acme~web~1@h1#2 grpc~acme~web~1@h1#3 grpc~acme~web~1@h1#4]"
	if fmt.Sprint(ids) != want {
		m.t.Errorf("proxies %v, want %s", ids, want)
	}
	if ps := m.s.Problems(); len(ps) > 0 {
		m.t.Errorf("problems %v", ps)
	}
}

// untilAnswered calls until a call succeeds; the channel may still be told that
// there is no instance.
func untilAnswered(ctx context.Context, c *grpcCaller) error {
	for {
		_, err := c.call()
		if err == nil {
			return nil
		}
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return fmt.Errorf("does not recover: %w", err)
		}
	}
}

// TestGRPCClientOfAnotherTenant: hidden equals absent. gRPC waits 15 s for a name
// before it says so.
func TestGRPCClientOfAnotherTenant(t *testing.T) {
	t.Parallel()
	address, _ := grpcServer(t)
	m := newMesh(t, spec("acme", "shop"), spec("globex", "web"))
	m.publish(at("acme/shop", "1", address, 1))
	dial := m.caller("grpc~globex~web~1@h1")
	var g sync.WaitGroup
	for _, target := range []string{"shop.acme", "nothing.globex"} {
		caller := dial(target)
		g.Go(func() {
			if _, err := caller.call(); status.Code(err) != codes.Unavailable {
				t.Errorf("%s: %v", target, err)
			}
		})
	}
	g.Wait()
	for _, p := range m.s.Proxies() {
		if p.Types != [envoy.Types]TypeStatus{} {
			t.Errorf("%s has %+v", p.ID, p.Types)
		}
	}
}
