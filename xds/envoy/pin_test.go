package envoy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
)

var pinIdentities = []lb.Identity{
	{Role: lb.Sidecar, Tenant: "a", Service: "x", Instance: "1"}, {Role: lb.Sidecar, Tenant: "b", Service: "x", Instance: "1"},
	{Role: lb.Node, Node: "h1"}, {Role: lb.Gateway, Group: "edge", Member: "m"},
	{Role: lb.Proxyless, Tenant: "a", Service: "y", Instance: "1"},
}

// holdings are the versions of what a view has of what is known, and of all that it
// lists, by name; Get and All must agree on it.
func holdings(t interface{ Fatalf(string, ...any) }, v View, known map[Name]bool) map[Name]string {
	out := map[Name]string{}
	for n := range known {
		if r := v.Get(n); r != nil {
			out[n] = r.Version
		}
	}
	for _, typ := range []Type{Cluster, Listener, Endpoint} {
		last := ""
		for r := range v.All(typ) {
			if got := v.Get(r.Name); got == nil || got.Version != r.Version || r.Name.Name <= last {
				t.Fatalf("All lists %v after %q, Get finds it: %v", r.Name, last, got != nil)
			}
			last, out[r.Name] = r.Name.Name, r.Version
		}
	}
	return out
}

// drawPin pins something that a view has at a version that it had.
func drawPin(t *rapid.T, v View, seen map[Name][]*Resource) *Pin {
	var names []Name
	for n := range seen {
		if r := v.Get(n); r != nil && r.InPlaceOf == "" {
			names = append(names, n)
		}
	}
	if len(names) == 0 {
		return nil
	}
	slices.SortFunc(names, func(a, b Name) int { return compareResources(&Resource{Name: a}, &Resource{Name: b}) })
	n := rapid.SampledFrom(names).Draw(t, "pinned")
	good := rapid.SampledFrom(append([]*Resource{nil}, seen[n]...)).Draw(t, "good")
	if built := v.Get(n); good != nil && (good.Version == built.Version || Replaces(good, built) != "") {
		return nil
	}
	p, err := NewPin(n, v.Get(n).Version, good)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return p
}

// TestPinnedSince: whatever is pinned and unpinned, what differs for a proxy from
// the World before is among what Since names, and its view is in itself whole.
func TestPinnedSince(t *testing.T) {
	applied := 0
	rapid.Check(t, func(rt *rapid.T) {
		w := &sinceWorld{config: &lb.Config{Domain: "roost", Node: "h1", Loopback: lb.LoopbackAll}, specs: map[lb.Key]*lb.ServiceSpec{}, addresses: map[lb.Key]lb.Addresses{}, instances: map[string]discovery.Instance{}}
		for i, key := range sinceKeys {
			w.addresses[key] = lb.Addresses{Internal: netip.AddrFrom4([4]byte{127, 128, 1, byte(i)})}
		}
		var world *Translation
		var overlaid *Pinned
		var pins []*Pin
		seen, known := map[Name][]*Resource{}, map[Name]bool{}
		for range rapid.IntRange(2, 15).Draw(rt, "steps") {
			w.step(rt)
			w.keep = Keeps(pins)
			world = Translate(world, w.build(), nil)
			before := overlaid
			overlaid = world.Pinned(pins)
			change := overlaid.Since(before)
			for _, id := range pinIdentities {
				for r := range world.Everything(id) {
					known[r.Name] = true
				}
				view := overlaid.View(Proxy{Identity: id})
				now := holdings(rt, view, known)
				for r := range view.All(Cluster) {
					if r.InPlaceOf != "" {
						applied++
					}
				}
				if before == nil || change.Views || slices.Contains(change.Nodes, id.Node) {
					continue
				}
				was := holdings(rt, before.View(Proxy{Identity: id}), known)
				for _, m := range []map[Name]string{now, was} {
					for n := range m {
						if now[n] != was[n] && !slices.Contains(change.Names, n) {
							rt.Fatalf("%s: %v was %q and is %q, which Since does not name: %v", id, n, was[n], now[n], change.Names)
						}
					}
				}
			}
			for _, id := range pinIdentities {
				v := world.View(Proxy{Identity: id})
				for r := range world.Everything(id) {
					if typ := r.Type; typ == Cluster || typ == Listener || typ == Route {
						seen[r.Name] = append(seen[r.Name], r)
					}
				}
				if p := drawPin(rt, v, seen); p != nil && rapid.Bool().Draw(rt, "pin") {
					pins = append(slices.Clone(pins), p)
				}
			}
			if len(pins) > 0 && rapid.IntRange(0, 3).Draw(rt, "unpin") == 0 {
				pins = slices.Clone(pins[1:])
			}
		}
	})
	if applied == 0 {
		t.Error("no cluster was ever pinned")
	}
}

// pinWorld has two services, of which x.a:80 routes to v1 of the other.
func pinWorld(t *testing.T, regex string, allow []lb.Grant, to ...lb.Target) (*sinceWorld, func(keep map[lb.Key][]string) *Translation) {
	t.Helper()
	w := &sinceWorld{config: &lb.Config{Domain: "roost", Node: "h1"}, specs: map[lb.Key]*lb.ServiceSpec{}, addresses: map[lb.Key]lb.Addresses{}, instances: map[string]discovery.Instance{}}
	for i, key := range sinceKeys {
		w.addresses[key] = lb.Addresses{Internal: netip.AddrFrom4([4]byte{127, 128, 1, byte(i)})}
		w.specs[key] = &lb.ServiceSpec{Key: key, Ports: []lb.PortSpec{{Name: "http", Port: 80, Protocol: lb.HTTP}}, Allow: allow}
		w.instances[fmt.Sprint(i)] = discovery.Instance{ID: fmt.Sprint(i), Key: key, Version: "v1", Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), Ports: []discovery.Port{{Number: 80}}, Weight: 1, Health: discovery.Passing}
	}
	w.config.Routes = []*lb.RouteSpec{{Name: "r", Tenant: "a", Match: lb.Match{PathRegex: regex}, To: append([]lb.Target{{Service: sinceKeys[0], Weight: 1}}, to...)}}
	return w, func(keep map[lb.Key][]string) *Translation {
		w.keep = keep
		return Translate(nil, w.build(), nil)
	}
}

// TestPinKeepsWhatItLeadsTo: the cluster of a version that only the pinned route
// names is there, with the endpoints of now; a grant that was taken back is not
// brought back by a pin.
func TestPinKeepsWhatItLeadsTo(t *testing.T) {
	other := lb.Target{Service: sinceKeys[3], Version: "v1", Weight: 1} // of tenant b
	grant := []lb.Grant{{Tenant: "a"}}
	_, build := pinWorld(t, "/good", grant, other)
	proxy := Proxy{Identity: pinIdentities[0]} // of tenant a
	name := Name{Route, "x.a:80"}
	good := build(nil).View(proxy).Get(name)
	for _, c := range []struct {
		what  string
		allow []lb.Grant
		kept  bool
	}{{"granted", grant, true}, {"taken back", nil, false}} {
		_, build := pinWorld(t, "/bad", c.allow)
		plain := build(nil)
		pin, err := NewPin(name, plain.View(proxy).Get(name).Version, good)
		if err != nil {
			t.Fatal(err)
		}
		world := build(Keeps([]*Pin{pin}))
		overlaid := world.Pinned([]*Pin{pin})
		view := overlaid.View(proxy)
		route := view.Get(name)
		if c.kept != (route.Version == good.Version) || c.kept != overlaid.Lawful(pin) || c.kept != (route.InPlaceOf == pin.Refused) {
			t.Errorf("%s: route %s in place of %q, the good one is %s", c.what, route.Version, route.InPlaceOf, good.Version)
		}
		for _, typ := range []Type{Cluster, Endpoint} {
			n := Name{typ, "z.b:http@v1"}
			listed := slices.ContainsFunc(slices.Collect(view.All(typ)), func(r *Resource) bool { return r.Name == n })
			if (view.Get(n) != nil) != c.kept || listed != c.kept {
				t.Errorf("%s: %s there %v, listed %v", c.what, typ, view.Get(n) != nil, listed)
			}
		}
	}
}

// TestPinnedWithoutPins costs nothing: views are those of the World.
func TestPinnedWithoutPins(t *testing.T) {
	_, build := pinWorld(t, "/x", nil)
	world := build(nil)
	p := Proxy{Identity: pinIdentities[0]}
	if _, plain := world.Pinned(nil).View(p).(*view); !plain {
		t.Error("a view without pins is wrapped")
	}
	absent, err := NewPin(Name{Listener, "x.a:80"}, world.View(p).Get(Name{Listener, "x.a:80"}).Version, nil)
	if err != nil {
		t.Fatal(err)
	}
	overlaid := world.Pinned([]*Pin{absent})
	before := maps.Clone(holdings(t, world.Pinned(nil).View(p), nil))
	now := holdings(t, overlaid.View(p), nil)
	if _, there := now[absent.Name]; there || len(now) >= len(before) {
		t.Errorf("what is left out is there: %v", now)
	}
	if c := overlaid.Since(world.Pinned(nil)); !slices.Equal(c.Names, []Name{absent.Name}) {
		t.Errorf("Since names %v", c.Names)
	}
}

// TestPinThatFallsAway: a gateway holds a cluster only for the pinned version;
// when the built one becomes another, it is told.
func TestPinThatFallsAway(t *testing.T) {
	public := func(regex string, to ...lb.Target) (*sinceWorld, func(map[lb.Key][]string) *Translation) {
		w, build := pinWorld(t, regex, []lb.Grant{{Tenant: "a"}}, to...)
		w.config.Listeners = []*lb.ListenerSpec{{Name: "web", Gateway: "edge", Protocol: lb.HTTP, Address: netip.MustParseAddrPort("0.0.0.0:8080")}}
		w.config.Routes[0].Listeners = []string{"web"}
		return w, build
	}
	_, before := public("/good", lb.Target{Service: sinceKeys[3], Version: "v1", Weight: 1})
	proxy, name := Proxy{Identity: pinIdentities[3]}, Name{Route, "web"}
	w, build := public("/bad")
	pin, err := NewPin(name, build(nil).View(proxy).Get(name).Version, before(nil).View(proxy).Get(name))
	if err != nil {
		t.Fatal(err)
	}
	pins := []*Pin{pin}
	world := build(Keeps(pins))
	overlaid := world.Pinned(pins)
	clear(w.instances) // now the route says that there is none
	next := Translate(world, w.build(), nil).Pinned(pins)
	change := next.Since(overlaid)
	for _, n := range []Name{{Cluster, "z.b:http@v1"}, {Endpoint, "z.b:http@v1"}} {
		had, has := overlaid.View(proxy).Get(n), next.View(proxy).Get(n)
		listed := slices.ContainsFunc(slices.Collect(overlaid.View(proxy).All(n.Type)), func(r *Resource) bool { return r == had })
		if had == nil || !listed || has != nil || change.Views || !slices.Contains(change.Names, n) {
			t.Errorf("%v: had %v, listed %v, has %v, Since names %+v", n, had != nil, listed, has != nil, change)
		}
	}
	if r := next.View(proxy).Get(name); r == nil || r.InPlaceOf != "" {
		t.Errorf("the route is %+v", r)
	}
}
