package envoy

import (
	"net/netip"
	"testing"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"github.com/google/go-cmp/cmp"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
)

// routedTo is a virtual host that says which one it was.
func routedTo(cluster string, domains ...string) *routev3.VirtualHost {
	return &routev3.VirtualHost{Name: domains[0], Domains: domains, Routes: []*routev3.Route{{
		Match:  match(lb.Match{}),
		Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster}}},
	}}}
}

// TestHosts picks virtual hosts as Envoy does.
func TestHosts(t *testing.T) {
	route := encode(Route, "web", &routev3.RouteConfiguration{Name: "web", VirtualHosts: []*routev3.VirtualHost{
		routedTo("short", "*.example", "*.com"), routedTo("long", "*.deep.example"), routedTo("exact", "a.example", "Upper.Example"),
		routedTo("prefix", "a.*"), routedTo("longer", "a.b.*"), routedTo("v6", "[::1]"),
	}}, Name{Cluster, "exact"}, Name{Cluster, "short"})
	for host, want := range map[string]string{
		"a.example": "exact", "A.EXAMPLE:8080": "exact", "upper.example": "exact", "b.example": "short", ".example": "",
		"x.deep.example": "long", "deep.example": "short", "a.org": "prefix", "a.b.org": "longer", "a.": "", "org": "", "[::1]:80": "v6", "[::1]": "v6",
	} {
		name := "web/" + host
		r := NewHosts(route).Get(Name{VirtualHost, name})
		if r == nil {
			if want != "" {
				t.Errorf("%s: none, want %s", host, want)
			}
			continue
		}
		m, err := r.Message()
		if err != nil {
			t.Fatal(err)
		}
		v := m.(*routev3.VirtualHost)
		if got := v.GetRoutes()[0].GetRoute().GetCluster(); got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
		if v.GetName() != name || !cmp.Equal(v.GetDomains(), []string{host}) {
			t.Errorf("%s: name %q, domains %q", host, v.GetName(), v.GetDomains())
		}
		for _, ref := range r.Refs {
			if ref.Name != want {
				t.Errorf("%s refers to %v", host, ref)
			}
		}
	}
	if r := NewHosts(route).Get(Name{VirtualHost, "web"}); r != nil {
		t.Errorf("the route alone is %v", r)
	}
	all := encode(Route, "all", &routev3.RouteConfiguration{VirtualHosts: []*routev3.VirtualHost{routedTo("any", "*"), routedTo("one", "a.*")}})
	for host, want := range map[string]string{"a.b": "one", "b": "any"} {
		m, _ := NewHosts(all).Get(Name{VirtualHost, "all/" + host}).Message()
		if got := m.(*routev3.VirtualHost).GetRoutes()[0].GetRoute().GetCluster(); got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
	}
}

// TestViewHasHosts: a proxy has the virtual hosts of the routes that it may hold.
func TestViewHasHosts(t *testing.T) {
	shop, other := lb.Key{Tenant: "acme", Service: "shop"}, lb.Key{Tenant: "other", Service: "hidden"}
	c := &lb.Config{Domain: "roost", Node: "h1"}
	var specs []*lb.ServiceSpec
	addresses := map[lb.Key]lb.Addresses{}
	for i, k := range []lb.Key{shop, other} {
		specs = append(specs, &lb.ServiceSpec{Key: k, Ports: []lb.PortSpec{{Name: "http", Port: 80, Protocol: lb.HTTP}}})
		addresses[k] = lb.Addresses{Internal: netip.AddrFrom4([4]byte{127, 128, 0, byte(i + 1)})}
	}
	s := lb.Build(nil, lb.Input{Config: c, Catalog: discovery.NewCatalog(nil), Services: specs, Addresses: addresses})
	v := Translate(nil, s, nil).View(Proxy{Identity: lb.Identity{Role: lb.Sidecar, Tenant: "acme", Service: "shop"}})
	r := v.Get(Name{VirtualHost, lb.RouteNameOf(shop, 80) + "/anything:80"})
	if r == nil || len(r.Refs) != 1 || r.Refs[0] != (Name{Cluster, lb.ClusterName(shop, "http", "")}) {
		t.Errorf("%+v, want the service's virtual host", r)
	}
	for _, name := range []string{lb.RouteNameOf(other, 80) + "/a", lb.RouteNameOf(shop, 81) + "/a", "web/a", lb.RouteNameOf(shop, 80), ""} {
		if r := v.Get(Name{VirtualHost, name}); r != nil {
			t.Errorf("%s is %+v, want none", name, r)
		}
	}
}

// TestPlaceholder: they are what Envoy takes, and only for what it asks for on demand.
func TestPlaceholder(t *testing.T) {
	for typ := range Types {
		r := Placeholder(Name{typ, "x/y"})
		if (r != nil) != (typ == Cluster || typ == Endpoint || typ == VirtualHost) {
			t.Errorf("%s: %v", typ, r)
		}
		if r == nil {
			continue
		}
		m, err := r.Message()
		if err != nil {
			t.Fatal(err)
		}
		if v, ok := m.(interface{ ValidateAll() error }); !ok || v.ValidateAll() != nil {
			t.Errorf("%s: %v", typ, v.ValidateAll())
		}
		if Placeholder(Name{typ, ""}) != nil {
			t.Errorf("%s: an empty name has a placeholder", typ)
		}
	}
}
