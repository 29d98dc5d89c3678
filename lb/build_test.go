package lb

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/roostmesh/roost/discovery"
)

// world draws what a Build goes by. Specs and the config keep their pointers
// from one draw to the next where drawn so, as the reconciler keeps them.
type world struct {
	config    *Config
	specs     map[Key]*ServiceSpec
	instances map[string]discovery.Instance
	host      []netip.Addr
	addresses map[Key]Addresses
	catalog   *discovery.Catalog
	drains    map[Key]map[string]Drain
	listed    []*ServiceSpec // of the last input
	addressed map[Key]Addresses
}

func (w *world) step(rt *rapid.T) {
	keys := []Key{{Tenant: "a", Service: "x"}, {Tenant: "a", Service: "y"}, {Tenant: "b", Service: "x"}}
	key := rapid.SampledFrom(keys).Draw(rt, "key")
	switch rapid.IntRange(0, 6).Draw(rt, "what") {
	case 0: // an instance comes or moves
		id := fmt.Sprint(rapid.IntRange(0, 4).Draw(rt, "id"))
		i := instance(key.Tenant, key.Service, id, rapid.SampledFrom([]string{"h1", "h2"}).Draw(rt, "node"), netip.AddrPortFrom(drawAddress(rt), 80).String())
		i.Version = rapid.SampledFrom([]string{"", "v1"}).Draw(rt, "version")
		i.Health = rapid.SampledFrom([]discovery.Health{discovery.Passing, discovery.Critical}).Draw(rt, "health")
		if rapid.Bool().Draw(rt, "node address") {
			i.NodeAddress = drawAddress(rt)
		}
		w.instances[id] = i
	case 1: // one goes
		delete(w.instances, fmt.Sprint(rapid.IntRange(0, 4).Draw(rt, "id")))
	case 2: // a service comes, changes or goes
		if w.specs[key] != nil && rapid.Bool().Draw(rt, "deleted") {
			delete(w.specs, key)
			break
		}
		w.specs[key] = spec(key.Tenant, key.Service, rapid.SampledFrom([][]Grant{nil, {{Tenant: "b"}}, {{Tenant: "b", Service: "x"}}}).Draw(rt, "allow")...)
	case 3: // its address
		w.addresses = maps.Clone(w.addresses)
		w.addresses[key] = Addresses{Internal: netip.AddrFrom4([4]byte{127, 128, 0, byte(rapid.IntRange(1, 3).Draw(rt, "internal"))}), Generation: 1}
	case 4: // an interface of this host
		w.host = []netip.Addr{drawAddress(rt)}
	case 5: // the file
		c := *w.config
		c.Routes = []*RouteSpec{{Name: "r", Tenant: "a", To: []Target{{Service: key, Version: rapid.SampledFrom([]string{"", "v1"}).Draw(rt, "routed"), Weight: 1}}, Origin: "f:1:1"}}
		c.Tenants = []*Tenant{{Name: "a", Clients: []Client{{Prefix: netip.PrefixFrom(drawAddress(rt), rapid.IntRange(8, 32).Draw(rt, "bits")).Masked()}}}, {Name: "b"}}
		w.config = &c
	case 6: // a drain begins, goes on or is over
		w.drains = maps.Clone(w.drains)
		if w.drains == nil {
			w.drains = map[Key]map[string]Drain{}
		}
		if rapid.Bool().Draw(rt, "over") {
			delete(w.drains, key)
			break
		}
		id := discovery.Instance{Key: key, ID: fmt.Sprint(rapid.IntRange(0, 4).Draw(rt, "id")), Node: "h1"}
		w.drains[key] = map[string]Drain{id.QualifiedName(): rapid.SampledFrom([]Drain{Draining, Closing, Drained}).Draw(rt, "phase")}
	}
}

func drawAddress(rt *rapid.T) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(1, 5).Draw(rt, "address"))})
}

// input is what the reconciler would hand over: groups that have not changed
// keep their pointer.
func (w *world) input() Input {
	var list []discovery.Instance
	for _, id := range slices.Sorted(maps.Keys(w.instances)) {
		list = append(list, w.instances[id])
	}
	catalog := discovery.NewCatalog(list)
	groups := catalog.Groups.Edit()
	for key, g := range catalog.Groups.All() {
		if w.catalog == nil || w.catalog.Groups.Get(key) == nil {
			continue
		}
		if before := w.catalog.Groups.Get(key); slices.EqualFunc(g.Instances, before.Instances, func(a, b *discovery.Instance) bool { return cmp.Equal(*a, *b, compareAddrs) }) {
			groups.Set(key, before)
		}
	}
	catalog.Groups = groups.Table()
	w.catalog = catalog
	var specs []*ServiceSpec
	for _, key := range slices.SortedFunc(maps.Keys(w.specs), Key.Compare) {
		specs = append(specs, w.specs[key])
	}
	same := slices.Equal(specs, w.listed) && maps.Equal(w.addresses, w.addressed)
	w.listed, w.addressed = specs, maps.Clone(w.addresses)
	return Input{Config: w.config, Catalog: catalog, Services: specs, Addresses: w.addresses, HostAddresses: w.host, Drains: maps.Clone(w.drains), Same: same}
}

var compareAddrs = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

// TestBuildByStepsIsBuildAtOnce: whatever came before, a Snapshot is what its
// input says; only what it shares with the one before differs.
func TestBuildByStepsIsBuildAtOnce(t *testing.T) {
	patched := 0
	defer func() {
		if patched == 0 {
			t.Error("no Snapshot was made of the one before alone")
		}
	}()
	rapid.Check(t, func(rt *rapid.T) {
		w := &world{config: &Config{Domain: "roost", Node: "h1"}, specs: map[Key]*ServiceSpec{}, instances: map[string]discovery.Instance{}, addresses: map[Key]Addresses{}}
		var by *Snapshot
		for range rapid.IntRange(1, 12).Draw(rt, "steps") {
			w.step(rt)
			in := w.input()
			before := by
			by = Build(before, in)
			if before != nil && in.Same && before.Config == by.Config {
				patched++
			}
			if diff := cmp.Diff(shape(Build(nil, in)), shape(by)); diff != "" {
				rt.Fatalf("at once (-) and by steps (+) differ:\n%s", diff)
			}
			if before == nil || before.Config != by.Config {
				continue
			}
			for key, svc := range by.Services.All() {
				same := before.Services.Get(key)
				if same != nil && same.Spec == svc.Spec && same.Group == svc.Group && same.addresses() == svc.addresses() && maps.Equal(same.Drains, svc.Drains) && same != svc {
					rt.Fatalf("%s was built again although nothing of it changed", key)
				}
			}
		}
	})
}

// shape is what a Snapshot says, without pointers.
func shape(s *Snapshot) map[string]any {
	out := map[string]any{"tenants": s.Tenants()}
	for _, svc := range s.Order {
		var endpoints []string
		for _, e := range svc.Endpoints {
			endpoints = append(endpoints, fmt.Sprint(e.Instance.QualifiedName(), e.At, e.Serving, e.Drain))
		}
		out["service "+svc.Key.String()] = fmt.Sprint(svc.Domain, svc.addresses(), svc.Ports, svc.Versions, endpoints, svc.Spec.Allow)
		if found, ok := s.ServiceAt(svc.Address); ok {
			out["owner of "+svc.Address.String()] = found.Key.String()
		}
	}
	for key, routes := range s.Mesh {
		for _, r := range routes {
			out[fmt.Sprint("route ", key, r.Order)] = fmt.Sprintf("%+v", *r)
		}
	}
	if !slices.IsSortedFunc(s.Problems, compareProblems) || len(s.Order) != s.Services.Len() {
		out["order"] = fmt.Sprint(s.Problems, len(s.Order), s.Services.Len())
	}
	for _, svc := range s.Draining {
		out["draining "+svc.Key.String()] = svc.Draining && s.Services.Get(svc.Key) == svc
	}
	for _, p := range s.Problems {
		out["problem "+p.Code+" "+p.Object+" "+p.Place] = p.Message
	}
	for _, node := range []string{"h1", "h2"} {
		for last := range 6 {
			addr := netip.AddrFrom4([4]byte{10, 0, 0, byte(last)})
			out[fmt.Sprint("who ", node, addr)] = fmt.Sprintf("%+v", s.Callers.Who(node, addr))
		}
		tenants, all := s.Callers.Tenants(node)
		out["tenants on "+node] = fmt.Sprint(tenants, all, s.Callers.Services(node))
		out["admitted on "+node] = fmt.Sprintf("%+v", s.Callers.Admit(node, "a", []Grant{{Tenant: "b"}}))
	}
	return out
}
