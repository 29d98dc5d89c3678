package lb

import (
	"fmt"
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"github.com/roostmesh/roost/discovery"
)

func instance(tenant, service, id, node, at string) discovery.Instance {
	ap := netip.MustParseAddrPort(at)
	return discovery.Instance{ID: id, Node: node, Key: Key{Tenant: tenant, Service: service}, Address: ap.Addr(), Ports: []discovery.Port{{Number: ap.Port()}}, Weight: 1, Health: discovery.Passing, Origin: "test:" + id}
}

func spec(tenant, service string, allow ...Grant) *ServiceSpec {
	return &ServiceSpec{Key: Key{Tenant: tenant, Service: service}, Ports: []PortSpec{{Name: "http", Port: 80, Protocol: HTTP}}, Allow: allow, Origin: "test"}
}

func client(cidr, node string) Client { return Client{Prefix: netip.MustParsePrefix(cidr), Node: node} }

// TestWho walks the order in which a caller is told apart.
func TestWho(t *testing.T) {
	c := &Config{Node: "h1", Loopback: LoopbackAll, Tenants: []*Tenant{
		{Name: "acme", Clients: []Client{client("10.0.0.0/8", ""), client("172.20.0.0/16", "h1")}},
		{Name: "globex", Clients: []Client{client("10.9.0.0/16", ""), client("172.20.0.0/16", "h2")}},
	}}
	catalog := discovery.NewCatalog([]discovery.Instance{
		instance("acme", "shop", "s", "h1", "192.168.1.5:80"), instance("globex", "web", "w", "h1", "192.168.1.6:80"),
		instance("acme", "shop", "both-a", "h1", "192.168.1.7:80"), instance("globex", "web", "both-g", "h1", "192.168.1.7:81"),
		instance("acme", "shop", "host", "h1", "192.168.1.1:80"), instance("globex", "web", "client", "h1", "10.1.2.3:80"),
	})
	s := Build(nil, Input{Config: c, Catalog: catalog, Services: []*ServiceSpec{spec("acme", "shop"), spec("globex", "web")}, HostAddresses: []netip.Addr{netip.MustParseAddr("192.168.1.1")}})
	for _, test := range []struct{ node, addr, want, service string }{
		{"h1", "127.0.0.1", "all", ""}, {"h1", "::1", "all", ""}, {"h1", "::ffff:127.0.0.1", "all", ""},
		{"h1", "10.1.1.1", "acme", ""}, {"h1", "10.9.1.1", "globex", ""}, // the longest prefix
		{"h1", "172.20.1.1", "acme", ""}, {"h2", "172.20.1.1", "globex", ""}, {"h3", "172.20.1.1", "nobody", ""},
		{"h1", "192.168.1.5", "acme", "shop"}, {"h2", "192.168.1.5", "nobody", ""},
		{"h1", "192.168.1.7", "nobody", ""}, // instances of two tenants
		{"h1", "192.168.1.1", "nobody", ""}, // the node itself
		{"h1", "10.1.2.3", "acme", ""},      // clients come before instances
		{"h1", "203.0.113.1", "nobody", ""},
	} {
		v := s.Callers.Who(test.node, netip.MustParseAddr(test.addr))
		if v.String() != test.want || v.Service != test.service {
			t.Errorf("%s on %s is %s %q (%s), want %s %q", test.addr, test.node, v, v.Service, v.Why, test.want, test.service)
		}
	}
}

// TestAdmitAgreesWithWho: what a node proxy lets in is exactly what DNS answers
// to, whatever the clients, instances and grants are.
func TestAdmitAgreesWithWho(t *testing.T) {
	tenants, nodes := []string{"a", "b", "c"}, []string{"h1", "h2", ""}
	rapid.Check(t, func(rt *rapid.T) {
		address := func(label string) netip.Addr {
			return netip.AddrFrom4([4]byte{10, byte(rapid.IntRange(0, 1).Draw(rt, label)), byte(rapid.IntRange(0, 3).Draw(rt, label)), byte(rapid.IntRange(0, 7).Draw(rt, label))})
		}
		c := &Config{Node: "h1", Loopback: rapid.SampledFrom([]string{LoopbackAll, LoopbackNone, "b"}).Draw(rt, "loopback")}
		taken := map[string]bool{}
		for _, name := range tenants {
			tenant := &Tenant{Name: name}
			for range rapid.IntRange(0, 3).Draw(rt, "clients") {
				p := netip.PrefixFrom(address("client"), rapid.IntRange(0, 32).Draw(rt, "bits")).Masked()
				node := rapid.SampledFrom(nodes).Draw(rt, "node")
				if id := p.String() + "@" + node; !taken[id] { // config refuses the same one twice
					taken[id] = true
					tenant.Clients = append(tenant.Clients, Client{Prefix: p, Node: node})
				}
			}
			c.Tenants = append(c.Tenants, tenant)
		}
		var list []discovery.Instance
		for i := range rapid.IntRange(0, 6).Draw(rt, "instances") {
			list = append(list, instance(rapid.SampledFrom(tenants).Draw(rt, "tenant"), rapid.SampledFrom([]string{"x", "y"}).Draw(rt, "service"), fmt.Sprint(i), rapid.SampledFrom([]string{"h1", "h2"}).Draw(rt, "on"), netip.AddrPortFrom(address("instance"), 80).String()))
		}
		var specs []*ServiceSpec
		for _, name := range tenants {
			specs = append(specs, spec(name, "x"), spec(name, "y"))
		}
		specs[0].Allow = []Grant{{Tenant: "b"}, {Tenant: "c", Service: "x"}}
		s := Build(nil, Input{Config: c, Catalog: discovery.NewCatalog(list), Services: specs, HostAddresses: []netip.Addr{address("host")}})
		service := s.Services.Get(Key{Tenant: "a", Service: "x"})
		caller := address("caller")
		if n := rapid.IntRange(0, 7).Draw(rt, "over loopback"); n < 3 {
			caller = []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.9.9.9"), netip.MustParseAddr("::1")}[n]
		}
		in := false
		for _, a := range s.Callers.Admit("h1", "a", service.Spec.Allow) {
			inside := a.Prefix.Contains(caller)
			for _, e := range a.Except {
				inside = inside && !e.Contains(caller)
			}
			in = in || inside
		}
		if who := s.Callers.Who("h1", caller); who.Sees(service) != in {
			rt.Fatalf("%s is %s (%s): sees %v, admitted %v", caller, who, who.Why, who.Sees(service), in)
		}
		// Whoever may call finds a listener on the node's proxy.
		if in && !s.SightOf(Identity{Role: Node, Node: "h1"}).Sees(service) {
			rt.Fatalf("%s may call, but the node's proxy does not hold the service", caller)
		}
	})
}

// TestBuildSharesWhatDidNotChange: an endpoint that moves rebuilds its service
// and nothing else, and the same input gives the same Snapshot.
func TestBuildSharesWhatDidNotChange(t *testing.T) {
	c := &Config{Domain: "roost", Node: "h1", Tenants: []*Tenant{{Name: "acme"}}}
	specs := []*ServiceSpec{spec("acme", "shop"), spec("acme", "cart")}
	first := []discovery.Instance{instance("acme", "shop", "s", "h1", "10.0.0.1:80"), instance("acme", "cart", "c", "h1", "10.0.0.2:80")}
	a := discovery.NewCatalog(first)
	one := Build(nil, Input{Config: c, Catalog: a, Services: specs})
	moved := *a
	shop, cart := Key{Tenant: "acme", Service: "shop"}, Key{Tenant: "acme", Service: "cart"}
	groups := a.Groups.Edit()
	groups.Set(shop, discovery.NewCatalog([]discovery.Instance{instance("acme", "shop", "s", "h1", "10.0.0.9:80")}).Groups.Get(shop))
	moved.Groups = groups.Table()
	two := Build(one, Input{Config: c, Catalog: &moved, Services: specs})
	if two.Services.Get(cart) != one.Services.Get(cart) || two.Services.Get(shop) == one.Services.Get(shop) {
		t.Error("the move of shop has rebuilt cart, or has not rebuilt shop")
	}
	if got := two.Services.Get(shop).Endpoints[0].At[0].String(); got != "10.0.0.9:80" {
		t.Errorf("shop is at %s", got)
	}
	if two.Version != one.Version+1 {
		t.Errorf("version %d after %d", two.Version, one.Version)
	}
	// Without the earlier Snapshot the outcome is the same.
	fresh := Build(nil, Input{Config: c, Catalog: &moved, Services: specs})
	for _, addr := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.9"} {
		x, y := two.Callers.Who("h1", netip.MustParseAddr(addr)), fresh.Callers.Who("h1", netip.MustParseAddr(addr))
		if x != y {
			t.Errorf("%s is %+v by steps and %+v at once", addr, x, y)
		}
	}
}

// TestProblemsNameTheWayOut reads the messages of a user's mistakes.
func TestProblemsNameTheWayOut(t *testing.T) {
	c := &Config{Domain: "roost", Node: "h1", Tenants: []*Tenant{{Name: "acme", Hosts: []string{"*.acme.example"}}, {Name: "globex"}},
		Listeners: []*ListenerSpec{{Name: "web", Protocol: HTTP, Gateway: "edge"}, {Name: "raw", Protocol: UDP, Gateway: "edge", Origin: "f:3:1"}},
		Routes: []*RouteSpec{
			{Name: "ghost", Tenant: "acme", Listeners: []string{"web"}, Hosts: []string{"a.acme.example"}, To: []Target{{Service: Key{Tenant: "acme", Service: "ghost"}}}, Origin: "f:4:1"},
			{Name: "foreign", Tenant: "globex", Listeners: []string{"web"}, Hosts: []string{"x.example"}, To: []Target{{Service: Key{Tenant: "acme", Service: "shop"}}}, Origin: "f:5:1"},
			{Name: "host", Tenant: "globex", Listeners: []string{"web"}, Hosts: []string{"b.acme.example"}, To: []Target{{Service: Key{Tenant: "globex", Service: "web"}}}, Origin: "f:6:1"},
			{Name: "nowhere", Tenant: "acme", Listeners: []string{"none"}, Hosts: []string{"c.acme.example"}, To: []Target{{Service: Key{Tenant: "acme", Service: "shop"}}}, Origin: "f:7:1"},
			{Name: "port", Tenant: "acme", Listeners: []string{"web"}, Hosts: []string{"d.acme.example"}, To: []Target{{Service: Key{Tenant: "acme", Service: "shop"}, Port: "grpc"}}, Origin: "f:8:1"},
		}}
	wrong := instance("acme", "shop", "wants", "h1", "10.0.0.4:80")
	wrong.Wants = []discovery.WantedPort{{Name: "http", Dial: 81, Protocol: HTTP}}
	udp := spec("globex", "web")
	udp.Ports = append(udp.Ports, PortSpec{Name: "game", Port: 7777, Protocol: UDP})
	inbound := instance("acme", "shop", "inbound", "h1", "10.0.0.6:80")
	inbound.Inbound = 20000
	s := Build(nil, Input{Config: c, Services: []*ServiceSpec{spec("acme", "shop"), udp}, Catalog: discovery.NewCatalog([]discovery.Instance{
		instance("acme", "undeclared", "u", "h1", "10.0.0.1:80"), instance("acme", "shop", "far", "h2", "127.0.0.1:80"), instance("acme", "shop", "bridge", "h2", "172.17.0.2:80"), wrong, inbound,
	})})
	got := map[string]Problem{}
	for _, p := range s.Problems {
		got[p.Code] = p
		if p.Message == "" || p.Fix == "" || p.Object == "" || p.Place == "" {
			t.Errorf("problem %+v lacks a part", p)
		}
	}
	for code, place := range map[string]string{
		"service_undeclared": "test:u", "instance_unreachable": "test:far", "port_conflict": "test:wants", "route_unknown_service": "f:4:1", "route_not_allowed": "f:5:1",
		"host_not_allowed": "f:6:1", "route_unknown_listener": "f:7:1", "route_unknown_port": "f:8:1", "protocol_unsupported": "f:3:1", "loopback_unset": "loopback", "inbound_unsupported": "test:inbound",
	} {
		if p, ok := got[code]; !ok || code != "instance_unreachable" && code != "protocol_unsupported" && p.Place != place {
			t.Errorf("%s at %s is %+v", code, place, p)
		}
	}
	for _, e := range s.Services.Get(Key{Tenant: "acme", Service: "shop"}).Endpoints {
		if want := e.Instance.ID != "far"; e.Serving != want {
			t.Errorf("instance %s takes traffic: %v, want %v", e.Instance.ID, e.Serving, want)
		}
	}
}

func TestIdentityRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		part := func(label string) string { return rapid.StringN(1, 8, -1).Draw(rt, label) }
		want := Identity{Role: rapid.SampledFrom([]Role{Sidecar, Proxyless}).Draw(rt, "role"), Tenant: part("tenant"), Service: part("service"), Instance: part("instance")}
		if rapid.Bool().Draw(rt, "on a node") {
			want.Node = part("node")
		}
		if got, err := ParseIdentity(want.String()); err != nil || got != want {
			rt.Fatalf("%s is read as %+v, %v; want %+v", want, got, err, want)
		}
	})
	for _, id := range []Identity{
		{Role: Sidecar, Tenant: "acme", Service: "shop", Instance: "a~b/c@d%e", Node: "h@1"}, {Role: Sidecar, Tenant: "acme", Service: "shop", Instance: "s"},
		{Role: Node, Node: "h~1"}, {Role: Gateway, Group: "edge", Member: "h1/x"},
	} {
		if got, err := ParseIdentity(id.String()); err != nil || got != id {
			t.Errorf("%s is read as %+v, %v; want %+v", id, got, err, id)
		}
	}
	for _, bad := range []string{"", "node", "node~", "sidecar~a~b", "gateway~edge", "x~y~z", "node~%zz", "grpc~a~b", "grpc~a~b~@h1", "sidecar~a~b~@h1", "sidecar~a~b~x@", "sidecar~a~b~x@y@z"} {
		if _, err := ParseIdentity(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
