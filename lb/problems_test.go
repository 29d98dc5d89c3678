package lb

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/roostmesh/roost/discovery"
)

// TestWhatProblemsSay: one mistake at a time, and all that is said of it.
func TestWhatProblemsSay(t *testing.T) {
	shop, web := Key{Tenant: "acme", Service: "shop"}, Key{Tenant: "globex", Service: "web"}
	route := func(tenant string, to Target, more func(*RouteSpec)) func(*Config) {
		return func(c *Config) {
			r := &RouteSpec{Name: "r", Tenant: tenant, Listeners: []string{"web"}, To: []Target{to}, Origin: "f:9:1"}
			if more != nil {
				more(r)
			}
			c.Routes = append(c.Routes, r)
		}
	}
	at := func(i discovery.Instance, more func(*discovery.Instance)) []discovery.Instance {
		if more != nil {
			more(&i)
		}
		return []discovery.Instance{i}
	}
	for _, test := range []struct {
		name      string
		config    func(*Config)
		shop      func(*ServiceSpec)
		instances []discovery.Instance
		want      string // severity code object place: message -> fix
	}{
		{name: "none", want: ""},
		{name: "undeclared", instances: []discovery.Instance{instance("acme", "cart", "c", "h1", "10.0.0.1:80")},
			want: "error service_undeclared acme/cart/c@h1 test:c: is an instance of acme/cart, which nobody has declared; it takes no traffic -> declare the service in roost.yaml, or run `roost service create acme/cart --port PORT`"},
		{name: "loopback of another node", instances: []discovery.Instance{instance("acme", "shop", "s", "h2", "127.0.0.1:80")},
			want: "error instance_unreachable acme/shop/s@h2 test:s: its address 127.0.0.1 is a loopback address of node \"h2\" and reaches nothing from node \"h1\" -> register the instance with an address that the other hosts reach"},
		{name: "loopback of this node", instances: []discovery.Instance{instance("acme", "shop", "s", "h1", "127.0.0.1:80")}},
		{name: "bridge of another node", instances: []discovery.Instance{instance("acme", "shop", "s", "h2", "172.17.0.2:80")},
			want: "warning instance_unreachable acme/shop/s@h2 test:s: its address 172.17.0.2 lies in a container bridge range of node \"h2\" and may not be reached from node \"h1\" -> register the instance with the host's address and its published port, or use a routed container network"},
		{name: "bridge of this node", instances: []discovery.Instance{instance("acme", "shop", "s", "h1", "172.17.0.2:80")}},
		{name: "no such port", instances: at(instance("acme", "shop", "s", "h1", "10.0.0.1:80"), func(i *discovery.Instance) { i.Ports[0].Name = "grpc" }),
			want: "error instance_port_missing acme/shop/s@h1 test:s: serves none of the service's ports (http) -> give the instance an address with a port, or ports by the service's port names"},
		{name: "another dial port", instances: at(instance("acme", "shop", "s", "h1", "10.0.0.1:80"), func(i *discovery.Instance) {
			i.Wants = []discovery.WantedPort{{Name: "http", Dial: 81, Protocol: HTTP}}
		}),
			want: "warning port_conflict acme/shop/s@h1 test:s: asks for port http 81/http, but the service has 80/http, which stays -> change it with `roost service set` or in the file that declares the service, or mend the registration's meta"},
		{name: "a further port", instances: at(instance("acme", "shop", "s", "h1", "10.0.0.1:80"), func(i *discovery.Instance) {
			i.Wants = []discovery.WantedPort{{Name: "http", Dial: 80, Protocol: HTTP}, {Name: "admin", Dial: 90, Protocol: TCP}}
		}),
			want: "warning port_conflict acme/shop/s@h1 test:s: asks for port admin 90/tcp, but the service has no such port, which stays -> change it with `roost service set` or in the file that declares the service, or mend the registration's meta"},
		{name: "guessed", shop: func(s *ServiceSpec) { s.Ports[0].Guessed = true },
			want: "info port_guessed acme/shop test: nobody says which port callers dial; 80 was guessed and is kept -> register the instance with the meta roost-port, or declare the service in a file"},
		{name: "udp", shop: func(s *ServiceSpec) { s.Ports[0].Protocol = UDP },
			want: "error protocol_unsupported acme/shop test: port http is of protocol udp, which is not served yet: its name is answered, its address takes no datagrams -> let callers dial the instances for this port for now"},
		{name: "tls listener", config: func(c *Config) {
			c.Listeners = append(c.Listeners, &ListenerSpec{Name: "pass", Protocol: TLS, Origin: "f:8:1"})
		},
			want: "error protocol_unsupported listener pass f:8:1: protocol tls is not served yet -> use http, https or tcp"},
		{name: "unknown service", config: route("acme", Target{Service: Key{Tenant: "acme", Service: "ghost"}}, nil),
			want: "error route_unknown_service route r f:9:1: goes to service acme/ghost, which does not exist; its share is answered with 503 -> declare the service, register an instance of it, or run `roost service create acme/ghost --port PORT`"},
		{name: "unknown port", config: route("acme", Target{Service: shop, Port: "grpc"}, nil),
			want: "error route_unknown_port route r f:9:1: service acme/shop has no port \"grpc\"; it has (http) -> name a port of the service"},
		{name: "unknown listener", config: route("acme", Target{Service: shop}, func(r *RouteSpec) { r.Listeners = []string{"wbe"} }),
			want: "error route_unknown_listener route r f:9:1: there is no listener \"wbe\" -> declare it under listeners, or name one that exists"},
		{name: "another tenant's service", config: route("globex", Target{Service: shop}, nil),
			want: "error route_not_allowed route r f:9:1: tenant globex may not call acme/shop; the route is left out -> add `allow: [globex]` to the service"},
		{name: "granted", config: route("globex", Target{Service: shop}, nil), shop: func(s *ServiceSpec) { s.Allow = []Grant{{Tenant: "globex"}} }},
		{name: "granted to one service only", config: route("globex", Target{Service: shop}, nil), shop: func(s *ServiceSpec) { s.Allow = []Grant{{Tenant: "globex", Service: "web"}} },
			want: "error route_not_allowed route r f:9:1: tenant globex may not call acme/shop; the route is left out -> add `allow: [globex]` to the service"},
		{name: "not one of its hosts", config: route("acme", Target{Service: shop}, func(r *RouteSpec) { r.Hosts = []string{"x.org"} }),
			want: "error host_not_allowed route r f:9:1: tenant acme may not use host x.org (its hosts: *.acme.example); the route is left out -> use one of the tenant's hosts, or extend tenants.acme.hosts"},
		{name: "another tenant's host", config: route("globex", Target{Service: web}, func(r *RouteSpec) { r.Hosts = []string{"a.acme.example"} }),
			want: "error host_not_allowed route r f:9:1: host a.acme.example belongs to tenant acme; the route is left out -> use another host, or change tenants.acme.hosts"},
		{name: "two routes of one tcp listener", config: func(c *Config) {
			c.Listeners[0].Protocol = TCP
			route("acme", Target{Service: shop}, nil)(c)
			route("acme", Target{Service: shop}, func(r *RouteSpec) { r.Name = "second" })(c)
		},
			want: "error route_conflict route second f:9:1: listener web is tcp and already goes to route r -> give each tcp listener one route"},
		{name: "loopback unset", config: func(c *Config) { c.LoopbackSet = false },
			want: "info loopback_unset loopback loopback: with several tenants, callers over loopback still see all of them -> write `loopback: all`, `loopback: none` or `loopback: TENANT` into roost.yaml"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := &Config{Domain: "roost", Node: "h1", LoopbackSet: true, Tenants: []*Tenant{{Name: "acme", Hosts: []string{"*.acme.example"}}, {Name: "globex"}},
				Listeners: []*ListenerSpec{{Name: "web", Protocol: HTTP, Gateway: "edge", Address: netip.MustParseAddrPort("0.0.0.0:80")}}}
			if test.config != nil {
				test.config(c)
			}
			s := spec("acme", "shop")
			if test.shop != nil {
				test.shop(s)
			}
			snapshot := Build(nil, Input{Config: c, Services: []*ServiceSpec{s, spec("globex", "web")}, Catalog: discovery.NewCatalog(test.instances)})
			got := ""
			for _, p := range snapshot.Problems {
				got += fmt.Sprintf("%s %s %s %s: %s -> %s", p.Severity, p.Code, p.Object, p.Place, p.Message, p.Fix)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestProblemsAreOrdered: what is worst first, then by code, object and place.
func TestProblemsAreOrdered(t *testing.T) {
	list := []Problem{{Severity: SeverityInfo, Code: "a"}, {Severity: SeverityError, Code: "b", Object: "y"}, {Severity: SeverityWarning, Code: "a"}, {Severity: SeverityError, Code: "b", Object: "x", Place: "2"}, {Severity: SeverityError, Code: "b", Object: "x", Place: "1"}}
	SortProblems(list)
	got := ""
	for _, p := range list {
		got += p.Severity + p.Code + p.Object + p.Place + " "
	}
	if want := "errorbx1 errorbx2 errorby warninga infoa "; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
