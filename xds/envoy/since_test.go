package envoy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
)

// sinceWorld draws what a World is made of, as the reconciler would keep it.
type sinceWorld struct {
	config    *lb.Config
	specs     map[lb.Key]*lb.ServiceSpec
	addresses map[lb.Key]lb.Addresses
	instances map[string]discovery.Instance
	snapshot  *lb.Snapshot
	listed    []*lb.ServiceSpec // of the last Snapshot
	addressed map[lb.Key]lb.Addresses
	keep      map[lb.Key][]string
	kept      map[lb.Key][]string // of the last Snapshot
}

var sinceKeys = []lb.Key{{Tenant: "a", Service: "x"}, {Tenant: "a", Service: "y"}, {Tenant: "b", Service: "x"}, {Tenant: "b", Service: "z"}}

func (w *sinceWorld) step(t *rapid.T) {
	key := rapid.SampledFrom(sinceKeys).Draw(t, "key")
	switch rapid.IntRange(0, 6).Draw(t, "what") {
	case 0, 1: // an instance comes or moves
		id := fmt.Sprint(rapid.IntRange(0, 5).Draw(t, "id"))
		w.instances[id] = discovery.Instance{ID: id, Key: key, Node: rapid.SampledFrom([]string{"h1", "h2"}).Draw(t, "node"), Weight: 1,
			Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(1, 4).Draw(t, "address"))}), Ports: []discovery.Port{{Number: 80}},
			Health: discovery.Passing, Version: rapid.SampledFrom([]string{"", "v1"}).Draw(t, "version")}
	case 2: // one goes
		delete(w.instances, fmt.Sprint(rapid.IntRange(0, 5).Draw(t, "id")))
	case 3: // a service comes or changes
		ports := []lb.PortSpec{{Name: "http", Port: 80, Protocol: lb.HTTP}}
		if rapid.Bool().Draw(t, "tcp") {
			ports = append(ports, lb.PortSpec{Name: "tcp", Port: 90, Protocol: lb.TCP})
		}
		w.specs[key] = &lb.ServiceSpec{Key: key, Ports: ports, Allow: rapid.SampledFrom([][]lb.Grant{nil, {{Tenant: "b"}}, {{Tenant: "a", Service: "y"}}}).Draw(t, "allow"),
			Policy: rapid.SampledFrom([]string{"", "maglev"}).Draw(t, "policy")}
	case 4: // one goes
		delete(w.specs, key)
	case 5: // its addresses
		a := lb.Addresses{Internal: netip.AddrFrom4([4]byte{127, 128, 0, byte(rapid.IntRange(1, 9).Draw(t, "internal"))})}
		if rapid.Bool().Draw(t, "dedicated") {
			a.Dedicated = netip.AddrFrom4([4]byte{198, 51, 100, byte(rapid.IntRange(1, 9).Draw(t, "address"))})
		}
		w.addresses[key] = a
	case 6: // the file
		c := *w.config
		c.Listeners = nil
		if rapid.Bool().Draw(t, "listener") {
			c.Listeners = []*lb.ListenerSpec{{Name: "web", Gateway: "edge", Protocol: lb.HTTP, Address: netip.MustParseAddrPort("0.0.0.0:8080")}}
		}
		route := &lb.RouteSpec{Name: "r", Tenant: key.Tenant, To: []lb.Target{{Service: key, Version: rapid.SampledFrom([]string{"", "v1"}).Draw(t, "routed"), Weight: 1}}, Origin: "f:1:1"}
		if len(c.Listeners) > 0 {
			route.Listeners = []string{"web"}
		} else {
			route.Hosts = []string{"x." + key.Tenant + ".roost"}
		}
		c.Routes = []*lb.RouteSpec{route}
		w.config = &c
	}
}

func (w *sinceWorld) build() *lb.Snapshot {
	var list []discovery.Instance
	for _, id := range slices.Sorted(maps.Keys(w.instances)) {
		list = append(list, w.instances[id])
	}
	var specs []*lb.ServiceSpec
	for _, key := range slices.SortedFunc(maps.Keys(w.specs), lb.Key.Compare) {
		specs = append(specs, w.specs[key])
	}
	same := slices.Equal(specs, w.listed) && maps.Equal(w.addresses, w.addressed) && maps.EqualFunc(w.keep, w.kept, slices.Equal)
	w.listed, w.addressed, w.kept = specs, maps.Clone(w.addresses), w.keep
	w.snapshot = lb.Build(w.snapshot, lb.Input{Config: w.config, Catalog: discovery.NewCatalog(list), Services: specs, Addresses: w.addressed, Same: same, Keep: w.keep})
	return w.snapshot
}

// versions are those of all that a proxy may hold, by name.
func versions(t *Translation, id lb.Identity) map[Name]string {
	out := map[Name]string{}
	for r := range t.Everything(id) {
		out[r.Name] = r.Version
	}
	return out
}

// TestSince: whatever came before, a World is what its Snapshot says, and for
// every proxy what differs from the one before is among what Since names.
func TestSince(t *testing.T) {
	identities := []lb.Identity{{Role: lb.Sidecar, Tenant: "a", Service: "x", Instance: "1"}, {Role: lb.Sidecar, Tenant: "b", Service: "x", Instance: "1"},
		{Role: lb.Proxyless, Tenant: "a", Service: "y", Instance: "1"}, {Role: lb.Node, Node: "h1"}, {Role: lb.Node, Node: "h2"}, {Role: lb.Gateway, Group: "edge", Member: "m"}}
	named := 0
	rapid.Check(t, func(rt *rapid.T) {
		w := &sinceWorld{config: &lb.Config{Domain: "roost", Node: "h1", Loopback: rapid.SampledFrom([]string{lb.LoopbackAll, lb.LoopbackNone}).Draw(rt, "loopback")},
			specs: map[lb.Key]*lb.ServiceSpec{}, addresses: map[lb.Key]lb.Addresses{}, instances: map[string]discovery.Instance{}}
		for i, key := range sinceKeys {
			w.addresses[key] = lb.Addresses{Internal: netip.AddrFrom4([4]byte{127, 128, 1, byte(i)})}
		}
		var world *Translation
		for range rapid.IntRange(1, 15).Draw(rt, "steps") {
			w.step(rt)
			before := world
			world = Translate(before, w.build(), nil)
			fresh := Translate(nil, w.snapshot, nil)
			change := world.Since(before)
			for _, id := range identities {
				now := versions(world, id)
				if want := versions(fresh, id); !maps.Equal(now, want) {
					rt.Fatalf("%s: by steps %v, at once %v", id, now, want)
				}
				if before == nil || change.Views || slices.Contains(change.Nodes, id.Node) {
					continue
				}
				was := versions(before, id)
				for _, m := range []map[Name]string{now, was} {
					for n := range m {
						if now[n] == was[n] {
							continue
						}
						named++
						if !slices.Contains(change.Names, n) {
							rt.Fatalf("%s: %v was %q and is %q, which Since does not name: %v", id, n, was[n], now[n], change.Names)
						}
					}
				}
			}
		}
	})
	if named == 0 {
		t.Error("nothing differed that had to be named")
	}
}

// TestSinceIsNoMore: what an instance, a service or a grant changes names nothing
// of other services.
func TestSinceIsNoMore(t *testing.T) {
	w := &sinceWorld{config: &lb.Config{Domain: "roost", Node: "h1"}, specs: map[lb.Key]*lb.ServiceSpec{}, addresses: map[lb.Key]lb.Addresses{}, instances: map[string]discovery.Instance{}}
	spec := func(key lb.Key) {
		w.specs[key] = &lb.ServiceSpec{Key: key, Ports: []lb.PortSpec{{Name: "http", Port: 80, Protocol: lb.HTTP}}}
	}
	for i, key := range sinceKeys {
		w.addresses[key] = lb.Addresses{Internal: netip.AddrFrom4([4]byte{127, 128, 1, byte(i)})}
		spec(key)
	}
	key := sinceKeys[0]
	instance := func(last byte) {
		w.instances["1"] = discovery.Instance{ID: "1", Key: key, Address: netip.AddrFrom4([4]byte{10, 0, 0, last}), Ports: []discovery.Port{{Number: 80}}, Weight: 1, Health: discovery.Passing}
	}
	instance(1)
	world := Translate(nil, w.build(), nil)
	for _, step := range []struct {
		what string
		do   func()
		want []Name
	}{
		{"an instance moves", func() { instance(2) }, []Name{{Endpoint, "x.a:http"}}},
		{"the last instance goes", func() { clear(w.instances) }, []Name{{Endpoint, "x.a:http"}, {Route, "x.a:80"}}},
		{"nothing", func() {}, nil},
		{"a policy", func() {
			spec := *w.specs[key]
			spec.Policy = "maglev"
			w.specs[key] = &spec
		}, []Name{{Cluster, "x.a:http"}, {Listener, "x.a:80"}, {Listener, "x.a:80@dedicated"}, {Endpoint, "x.a:http"}, {Route, "x.a:80"}}},
		{"a service goes", func() { delete(w.specs, key) }, []Name{{Cluster, "x.a:http"}, {Endpoint, "x.a:http"}, {Listener, "x.a:80"}, {Listener, "x.a:80@dedicated"}, {Route, "x.a:80"}}},
		{"it comes back", func() { spec(key) }, []Name{{Cluster, "x.a:http"}, {Endpoint, "x.a:http"}, {Listener, "x.a:80"}, {Listener, "x.a:80@dedicated"}, {Route, "x.a:80"}}},
	} {
		step.do()
		before := world
		world = Translate(before, w.build(), nil)
		change := world.Since(before)
		for _, n := range change.Names {
			if n.Type != Extension && !slices.Contains(step.want, n) && (n.Type != Listener || !strings.HasPrefix(n.Name, "x.a")) {
				t.Errorf("%s: Since names %v", step.what, n)
			}
		}
		if change.Views {
			t.Errorf("%s: every proxy is to look at all it has", step.what)
		}
		if len(step.want) > 0 && len(change.Names) == 0 {
			t.Errorf("%s: Since names nothing", step.what)
		}
	}
}
