package envoy

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
)

// BenchmarkMove is one endpoint that moves in a world of 10,000 services with
// ten endpoints each: the next Snapshot, its World, and what has changed.
func BenchmarkMove(b *testing.B) {
	const services, each, hosts = 10_000, 10, 2_000
	c := &lb.Config{Domain: "roost", Node: "h1", Tenants: []*lb.Tenant{{Name: "acme"}}}
	var list []discovery.Instance
	var specs []*lb.ServiceSpec
	addresses := map[lb.Key]lb.Addresses{}
	at := func(service, n int) discovery.Instance {
		return discovery.Instance{ID: fmt.Sprint(n), Node: fmt.Sprintf("n%d", (service*each+n)%hosts), Key: lb.Key{Tenant: "acme", Service: fmt.Sprintf("s%05d", service)}, Address: netip.AddrFrom4([4]byte{10, byte(n), byte(service >> 8), byte(service)}),
			Ports: []discovery.Port{{Number: 80}}, Weight: 1, Health: discovery.Passing}
	}
	for i := range services {
		key := lb.Key{Tenant: "acme", Service: fmt.Sprintf("s%05d", i)}
		specs = append(specs, &lb.ServiceSpec{Key: key, Ports: []lb.PortSpec{{Name: "http", Port: 80, Protocol: lb.HTTP}}})
		addresses[key] = lb.Addresses{Internal: netip.AddrFrom4([4]byte{127, 128, byte(i >> 8), byte(i)})}
		for n := range each {
			list = append(list, at(i, n))
		}
	}
	catalog := discovery.NewCatalog(list)
	in := lb.Input{Config: c, Catalog: catalog, Services: specs, Addresses: addresses, Same: true}
	snapshot := lb.Build(nil, in)
	world := Translate(nil, snapshot, nil)
	moved := lb.Key{Tenant: "acme", Service: "s00077"}
	var groups []*discovery.Group
	for _, n := range []int{20, 21} {
		instances := []discovery.Instance{at(77, n)}
		for i := 1; i < each; i++ {
			instances = append(instances, at(77, i))
		}
		groups = append(groups, discovery.NewCatalog(instances).Groups.Get(moved))
	}
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		next := *catalog
		edit := catalog.Groups.Edit()
		edit.Set(moved, groups[i%2])
		next.Groups = edit.Table()
		in.Catalog = &next
		built := lb.Build(snapshot, in)
		after := Translate(world, built, nil)
		if change := after.Since(world); len(change.Names) != 1 || change.Views {
			b.Fatalf("change %+v", change)
		}
		snapshot, world = built, after
	}
}
