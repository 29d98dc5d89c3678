package main

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// size is how large a world is.
type size struct {
	Services int `json:"services,omitempty"`
	Each     int `json:"each,omitempty"` // endpoints of a service
	Tenants  int `json:"tenants,omitempty"`
	Hosts    int `json:"hosts,omitempty"`
}

// world is what Roost is given, and what it has made of it.
type world struct {
	size
	input       lb.Input
	snapshot    *lb.Snapshot
	translation *envoy.Translation
	moves       int
}

func tenantName(n int) string  { return fmt.Sprintf("t%02d", n) }
func serviceName(n int) string { return fmt.Sprintf("s%05d", n) }

// key is the n-th service's: tenants take turns.
func (s size) key(n int) lb.Key {
	return lb.Key{Tenant: tenantName(n % s.Tenants), Service: serviceName(n)}
}

// clusterName is what its cluster and its endpoints are called.
func (s size) clusterName(n int) string { return lb.ClusterName(s.key(n), servedName, "") }

const (
	servedName  = "http"
	servedPort  = 80
	firstOctet  = 10
	movedOctet  = 11
	internalNet = 127
)

func (s size) instance(service, n int) discovery.Instance {
	return discovery.Instance{
		ID: fmt.Sprint(n), Node: fmt.Sprintf("n%d", (service*s.Each+n)%s.Hosts), Key: s.key(service),
		Address: netip.AddrFrom4([4]byte{firstOctet, byte(n), byte(service >> 8), byte(service)}),
		Ports:   []discovery.Port{{Number: 8080}}, Weight: 1, Health: discovery.Passing,
	}
}

func newWorld(s size) *world {
	c := &lb.Config{Domain: "roost", Node: "h1"}
	for i := range s.Tenants {
		c.Tenants = append(c.Tenants, &lb.Tenant{Name: tenantName(i)})
	}
	var instances []discovery.Instance
	in := lb.Input{Config: c, Addresses: map[lb.Key]lb.Addresses{}}
	for i := range s.Services {
		key := s.key(i)
		in.Services = append(in.Services, &lb.ServiceSpec{Key: key, Ports: []lb.PortSpec{{Name: servedName, Port: servedPort, Protocol: lb.HTTP}}})
		in.Addresses[key] = lb.Addresses{Internal: netip.AddrFrom4([4]byte{internalNet, 128, byte(i >> 8), byte(i)})}
		for n := range s.Each {
			instances = append(instances, s.instance(i, n))
		}
	}
	slices.SortFunc(in.Services, func(a, b *lb.ServiceSpec) int { return a.Key.Compare(b.Key) }) // as the daemon has them
	in.Catalog = discovery.NewCatalog(instances)
	return &world{size: s, input: in}
}

// build makes the next Snapshot and World, and says what differs.
func (w *world) build() (*envoy.Translation, envoy.Change) {
	before := w.translation
	w.snapshot = lb.Build(w.snapshot, w.input)
	w.input.Same = true
	w.translation = envoy.Translate(before, w.snapshot, nil)
	return w.translation, w.translation.Since(before)
}

// moved is an address that nothing has had before.
func moved(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{movedOctet, byte(n >> 16), byte(n >> 8), byte(n)})
}

// move gives the catalog in which the first instances of services are
// elsewhere.
func (w *world) move(services ...int) {
	next := *w.input.Catalog
	groups := next.Groups.Edit()
	for _, service := range services {
		w.moves++
		first := w.instance(service, 0)
		first.Address, first.Node = moved(w.moves), fmt.Sprintf("n%d", w.moves%w.Hosts)
		instances := []discovery.Instance{first}
		for n := 1; n < w.Each; n++ {
			instances = append(instances, w.instance(service, n))
		}
		groups.Set(w.key(service), discovery.NewCatalog(instances).Groups.Get(w.key(service)))
	}
	next.Groups = groups.Table()
	w.input.Catalog = &next
}

// proxy is what the first tenant's proxies are.
func (w *world) proxy() envoy.Proxy {
	key := w.key(0)
	return envoy.Proxy{Identity: lb.Identity{Role: lb.Sidecar, Tenant: key.Tenant, Service: key.Service, Instance: "any"}}
}

// held are the clusters of a proxy and their endpoints.
func (w *world) held() (clusters, endpoints []*envoy.Resource) {
	view := w.translation.View(w.proxy())
	for c := range view.All(envoy.Cluster) {
		clusters = append(clusters, c)
		if e := view.Get(envoy.Name{Type: envoy.Endpoint, Name: c.Name.Name}); e != nil {
			endpoints = append(endpoints, e)
		}
	}
	return clusters, endpoints
}
