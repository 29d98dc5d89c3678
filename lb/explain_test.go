package lb

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/roostmesh/roost/discovery"
)

// explained is a world with something for every outcome.
func explained(t *testing.T) *Snapshot {
	t.Helper()
	shop, cart, sick, db, far, full := spec("acme", "shop"), spec("acme", "cart"), spec("acme", "sick"), spec("acme", "db"), spec("acme", "far"), spec("acme", "full")
	shop.Allow = []Grant{{Tenant: "globex", Service: "web"}}
	shop.Ports = append(shop.Ports, PortSpec{Name: "raw", Port: 90, Protocol: TCP})
	shop.DedicatedPool = "public"
	db.Ports = []PortSpec{{Name: "tcp", Port: 5432, Protocol: TCP}}
	critical := instance("acme", "sick", "s", "h1", "10.0.0.3:80")
	critical.Health = discovery.Critical
	v1, v2 := instance("acme", "shop", "v1", "h1", "10.0.0.1:80"), instance("acme", "shop", "v2", "h1", "10.0.0.2:80")
	v1.Version, v2.Version = "v1", "v2"
	to := func(service, version string, weight uint32) Target {
		return Target{Service: Key{Tenant: "acme", Service: service}, Version: version, Weight: weight}
	}
	web := []string{"web"}
	c := &Config{Domain: "roost", Node: "h1", Tenants: []*Tenant{{Name: "acme"}, {Name: "globex", Clients: []Client{client("10.9.0.0/16", "")}}}, LoopbackSet: true,
		Listeners: []*ListenerSpec{
			{Name: "web", Protocol: HTTP, Gateway: "edge", Address: netip.MustParseAddrPort("0.0.0.0:80"), Origin: "f:1:1"},
			{Name: "plain", Protocol: HTTP, Gateway: "edge", Address: netip.MustParseAddrPort("0.0.0.0:8080"), Origin: "f:2:1"},
			{Name: "secure", Protocol: HTTPS, Gateway: "edge", Address: netip.MustParseAddrPort("0.0.0.0:8443"), RedirectFrom: "plain", Origin: "f:3:1"},
			{Name: "pg", Protocol: TCP, Gateway: "edge", Address: netip.MustParseAddrPort("0.0.0.0:6432"), Origin: "f:4:1"},
			{Name: "idle", Protocol: TCP, Gateway: "edge", Address: netip.MustParseAddrPort("0.0.0.0:6433"), Origin: "f:5:1"},
		},
		Routes: []*RouteSpec{
			{Name: "shop", Tenant: "acme", Listeners: web, Hosts: []string{"shop.example.com"}, Match: Match{PathPrefix: "/in"}, To: []Target{to("shop", "v1", 90), to("shop", "v2", 10)}, Origin: "f:6:1"},
			{Name: "gone", Tenant: "acme", Listeners: web, Hosts: []string{"cart.example.com"}, To: []Target{to("cart", "", 1)}, Origin: "f:7:1"},
			{Name: "sick", Tenant: "acme", Listeners: web, Hosts: []string{"sick.example.com"}, To: []Target{to("sick", "", 1)}, Origin: "f:8:1"},
			{Name: "kept", Tenant: "acme", Listeners: []string{"plain"}, Hosts: []string{"kept.example.com"}, To: []Target{to("shop", "", 1)}, Origin: "f:9:1"},
			{Name: "pg", Tenant: "acme", Listeners: []string{"pg"}, To: []Target{to("db", "", 1)}, Origin: "f:10:1"},
			{Name: "ghost", Tenant: "acme", Listeners: web, Hosts: []string{"ghost.example.com"}, To: []Target{to("ghost", "", 1)}, Origin: "f:11:1"},
			{Name: "drained", Tenant: "acme", Listeners: web, Hosts: []string{"drained.example.com"}, To: []Target{to("shop", "v1", 0), to("shop", "v3", 1)}, Origin: "f:13:1"},
			{Name: "canary", Tenant: "acme", Match: Match{Headers: []ValueMatch{{Name: "x-canary", Exact: "1"}}}, To: []Target{to("cart", "", 1)}, Origin: "f:12:1"},
		}}
	at := func(s string) Addresses { return Addresses{Internal: netip.MustParseAddr(s), Generation: 1} }
	addresses := map[Key]Addresses{shop.Key: at("127.128.0.1"), cart.Key: at("127.128.0.2"), sick.Key: at("127.128.0.3"), db.Key: at("127.128.0.4"), far.Key: at("127.128.0.5")}
	withIP := addresses[shop.Key]
	withIP.Dedicated = netip.MustParseAddr("198.51.100.17")
	addresses[shop.Key] = withIP
	return Build(nil, Input{Config: c, Addresses: addresses, Services: []*ServiceSpec{shop, cart, sick, db, far, full},
		Catalog: discovery.NewCatalog([]discovery.Instance{v1, v2, critical, instance("acme", "db", "d", "h1", "10.0.0.4:5432"), instance("acme", "far", "f", "h2", "127.0.0.1:80")})})
}

// TestExplainOutcomes: every outcome, where it comes from, and what is said of
// it. direct_response is of a route kind that does not exist yet.
func TestExplainOutcomes(t *testing.T) {
	s := explained(t)
	at := func(addr string) *View { v := s.Callers.Who("h1", netip.MustParseAddr(addr)); return &v }
	globex := func(service string) *View {
		return &View{Kind: ViewTenant, Tenant: "globex", Service: service, Why: "by name"}
	}
	for _, test := range []struct {
		name, url, listener          string
		headers                      map[string]string
		from                         *View
		outcome, at, route, why, via string // via: cluster, or address of a redirect
	}{
		{name: "routed", url: "http://shop.example.com/in/x", outcome: Routed, at: "web", route: "shop", via: "shop.acme:http@v1"},
		{name: "routed by its host header", url: "http://10.1.1.1/in", headers: map[string]string{"host": "SHOP.example.com:81"}, outcome: Routed, at: "web", route: "shop", via: "shop.acme:http@v1"},
		{name: "the path is normalized", url: "http://shop.example.com/x/..//in", outcome: Routed, at: "web", route: "shop", via: "shop.acme:http@v1"},
		{name: "no route", url: "http://shop.example.com/out", outcome: NoRoute, at: "web", why: "no route of host shop.example.com matches"},
		{name: "no host", url: "http://other.example.com/", outcome: NoHost, at: "web", why: "no route has host other.example.com"},
		{name: "no listener", url: "http://shop.example.com:81/", outcome: NoListener, why: "no public listener has port 81"},
		{name: "no such listener", url: "http://shop.example.com/", listener: "nope", outcome: NoListener, why: `there is no public listener "nope"`},
		{name: "by scheme", url: "https://kept.example.com/", outcome: NoHost, at: "secure", why: "no listener has port 443, so the listeners of scheme https were asked; no route has host kept.example.com"},
		{name: "no instance", url: "http://cart.example.com/", outcome: NoEndpoint, at: "web", route: "gone", via: "cart.acme:http", why: "no running instance"},
		{name: "no service", url: "http://ghost.example.com/", outcome: NoEndpoint, at: "web", route: "ghost", via: "ghost.acme:unknown", why: "no running instance"},
		{name: "no instance of its weight", url: "http://drained.example.com/", outcome: NoEndpoint, at: "web", route: "drained", via: "shop.acme:http@v3", why: "no running instance"},
		{name: "no healthy instance", url: "http://sick.example.com/", outcome: NoHealthyEndpoint, at: "web", route: "sick", via: "sick.acme:http", why: "none of the service's instances takes traffic"},
		{name: "redirected", url: "http://any.example.com:8080/a/../b?c=%2f", outcome: Redirected, at: "plain", via: "https://any.example.com:8443/b?c=%2f", why: "listener secure takes over by 308"},
		{name: "redirected by its host header", url: "http://127.0.0.1:8080/", headers: map[string]string{"host": "any.example.com:1234"}, outcome: Redirected, at: "plain", via: "https://any.example.com:8443/"},
		{name: "its own routes first", url: "http://kept.example.com:8080/", outcome: Routed, at: "plain", route: "kept", via: "shop.acme:http"},
		{name: "tcp", url: "tcp://anything:6432", outcome: Routed, at: "pg", route: "pg", via: "db.acme:tcp"},
		{name: "tcp without a route", url: "tcp://anything:6433", outcome: NoRoute, at: "idle", why: "no route is bound to listener idle; its connections are closed"},

		{name: "mesh", url: "http://shop.acme.roost/", outcome: Routed, at: "shop.acme:80", route: "shop.acme:80", via: "shop.acme:http"},
		{name: "mesh by address", url: "tcp://127.128.0.4:5432", outcome: Routed, at: "db.acme:5432", route: "db.acme:5432", via: "db.acme:tcp"},
		{name: "mesh route", url: "http://cart.acme.roost/", headers: map[string]string{"x-canary": "1"}, outcome: NoEndpoint, at: "cart.acme:80", route: "canary", via: "cart.acme:http", why: "its address and name stay"},
		{name: "dedicated", url: "http://shop.acme.dedicated.roost/", outcome: Routed, at: "shop.acme:80@dedicated", route: "shop.acme:80", via: "shop.acme:http"},
		{name: "no dedicated", url: "http://cart.acme.dedicated.roost/", outcome: NoHost, why: "no such service"},
		{name: "no such port", url: "tcp://shop.acme.roost:91", outcome: NoListener, why: "service acme/shop has no such port; it has 80/http, 90/tcp"},
		{name: "no such service", url: "http://nope.acme.roost/", outcome: NoHost, why: "no such service"},
		{name: "no such name", url: "http://a.b.c.roost/", outcome: NoHost, why: "the name does not exist"},
		{name: "unreachable", url: "http://far.acme.roost/", outcome: NoHealthyEndpoint, at: "far.acme:80", route: "far.acme:80", via: "far.acme:http"},
		{name: "no address", url: "http://full.acme.roost/", outcome: NoListener, why: "the service has no address: its pool is full"},
		{name: "granted", url: "http://shop.acme.roost/", from: globex("web"), outcome: Routed, at: "shop.acme:80", route: "shop.acme:80", via: "shop.acme:http"},
		{name: "not granted to another service", url: "http://shop.acme.roost/", from: globex("mail"), outcome: Denied, why: "tenant globex may not call acme/shop; its `allow` grants it to globex/web"},
		{name: "not granted to clients", url: "http://shop.acme.roost/", from: at("10.9.1.1"), outcome: Denied, why: "tenant globex may not call acme/shop"},
		{name: "nobody", url: "http://cart.acme.roost/", from: at("203.0.113.1"), outcome: Denied, why: "the caller is nobody"},
		{name: "everybody calls a dedicated IP", url: "http://198.51.100.17/", from: at("203.0.113.1"), outcome: Routed, at: "shop.acme:80@dedicated", route: "shop.acme:80", via: "shop.acme:http"},
	} {
		t.Run(test.name, func(t *testing.T) {
			e, err := s.Explain(Question{URL: test.url, Headers: test.headers, From: test.from, Listener: test.listener})
			if err != nil {
				t.Fatal(err)
			}
			got := []string{e.Outcome, of(e.Listener), of(e.Route), of(e.Cluster) + of(e.Location)}
			if diff := cmp.Diff([]string{test.outcome, test.at, test.route, test.via}, got); diff != "" {
				t.Errorf("outcome, listener, route, cluster or location:\n%s", diff)
			}
			if !strings.Contains(e.Why, test.why) {
				t.Errorf("says %q, want %q", e.Why, test.why)
			}
			for i, step := range e.Steps { // the first that fails is the last
				if !step.OK && i != len(e.Steps)-1 {
					t.Errorf("step %+v is followed by others", step)
				}
			}
		})
	}
}

func of(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// TestExplainSaysWhichInstances: each with where it is and why it takes no
// traffic, and the split with its weights.
func TestExplainSaysWhichInstances(t *testing.T) {
	s := explained(t)
	e, err := s.Explain(Question{URL: "http://shop.example.com/in"})
	if err != nil {
		t.Fatal(err)
	}
	want := []WeightedTarget{{"acme/shop", "v1", 90, "shop.acme:http@v1"}, {"acme/shop", "v2", 10, "shop.acme:http@v2"}}
	if diff := cmp.Diff(want, e.To); diff != "" {
		t.Error(diff)
	}
	for url, reason := range map[string]string{"http://sick.acme.roost/": "its health is critical", "http://far.acme.roost/": "it cannot be reached; see the problems", "tcp://shop.acme.roost:90": "it does not serve port raw"} {
		e, err := s.Explain(Question{URL: url})
		if err != nil {
			t.Fatal(err)
		}
		if got := e.Endpoints[0]; got.Serving || got.Reason != reason {
			t.Errorf("%s: %+v, want %q", url, got, reason)
		}
	}
}

func TestExplainRefusesWhatIsNoURL(t *testing.T) {
	s := explained(t)
	for url, want := range map[string]string{"ftp://x/": "want http://HOST/PATH", "http:///x": "want http://HOST/PATH", "http://x:99999/": "99999 is no port", "http://x:0/": "0 is no port", "http://%zz/": "invalid URL escape"} {
		if _, err := s.Explain(Question{URL: url}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", url, err, want)
		}
	}
}

// TestSight: what each kind of proxy may hold.
func TestSight(t *testing.T) {
	s := explained(t)
	none := *s.Config
	none.Loopback = LoopbackNone
	quiet := Build(nil, Input{Config: &none, Catalog: s.Catalog, Services: specs(s), Addresses: map[Key]Addresses{{Tenant: "acme", Service: "shop"}: {Dedicated: netip.MustParseAddr("198.51.100.17")}}})
	for id, want := range map[string]string{
		"sidecar~acme~cart~c":  "acme/cart acme/db acme/far acme/full acme/shop acme/sick",
		"sidecar~globex~web~w": "acme/shop", "sidecar~globex~mail~m": "", "sidecar~other~x~x": "",
		"grpc~globex~web~w": "acme/shop", "grpc~other~x~x": "", "grpc~acme~cart~c": "acme/cart acme/db acme/far acme/full acme/shop acme/sick",
		"node~h1":         "acme/cart acme/db acme/far acme/full acme/shop acme/sick",
		"node~h3":         "",                                                                       // only globex' clients may be there, and nothing is granted to the whole tenant
		"gateway~edge~h1": "acme/cart acme/db acme/shop acme/sick", "gateway~other~h1": "acme/shop", // for its dedicated IP
	} {
		identity, err := ParseIdentity(id)
		if err != nil {
			t.Fatal(err)
		}
		sight := quiet.SightOf(identity)
		var got []string
		for _, svc := range quiet.Order {
			if sight.Sees(svc) {
				got = append(got, svc.Key.String())
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s sees %v, want %s", id, got, want)
		}
	}
	// The host itself is everybody unless it is told otherwise.
	if !s.SightOf(Identity{Role: Node, Node: "h3"}).Sees(s.Order[0]) {
		t.Error("with loopback: all a node proxy does not see every service")
	}
}

func specs(s *Snapshot) []*ServiceSpec {
	var out []*ServiceSpec
	for _, svc := range s.Order {
		out = append(out, svc.Spec)
	}
	return out
}
