// Package envoy turns the routing model into what the real Envoy takes. A
// Snapshot and key pairs go in; a World of encoded resources comes out, each
// with a version that is a hash of its content, and a View of it for each
// proxy. The package is pure: it starts no goroutine and does no I/O.
//
// What an earlier World has encoded and nothing has changed is used again, so
// that a change costs what it changed. Listeners and routes are encoded when
// the first proxy of their kind asks for them.
package envoy

import (
	"cmp"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/roostmesh/roost/certs"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/proxyless"
)

// Translation is the World of one Snapshot.
type Translation struct {
	snapshot *lb.Snapshot
	services lb.Table[lb.Key, *serviceSet]
	order    []*serviceSet // by the names of their resources
	ports    int           // of all services
	public   map[string]*publicSet
	// via lists the services whose mesh routes lead to a service: who sees one
	// of them holds its clusters, too.
	via map[lb.Key][]lb.Key
	// rules has one service for each rule that admits callers. All services of a
	// rule have the same tenant and the same grants.
	rules   map[string]*lb.Service
	callers *callersCache
}

// serviceSet is every resource of one service, shared by all proxies.
type serviceSet struct {
	service   *lb.Service
	prefix    string // of the names of its resources: SERVICE.TENANT:
	mesh      []*lb.Route
	clusters  []*Resource
	endpoints []*Resource
	shapes    *shapes
	routes    *routeSet
	proxyless *proxylessSet
}

// shapes are the listeners, which do not depend on instances, made on demand.
type shapes struct {
	sidecar, node, dedicated *lazy
}

// routeSet is a service's route configurations, made on demand.
type routeSet struct {
	reasons []string // of the mesh routes, then of the service itself
	encoded *lazy
	hosts   func() map[string]*Hosts
}

// publicSet is every resource of one public listener.
type publicSet struct {
	listener *lb.Listener
	routes   []*lb.Route
	reasons  []string // of the routes
	secrets  []secret
	encoded  *lazy // the listener first where it can be served, its routes, its secrets
	hosts    func() map[string]*Hosts
}

// callersCache keeps the rules of each node; they are made on demand.
type callersCache struct {
	callers *lb.Callers
	mu      sync.Mutex
	rules   map[callersKey]*Resource // guarded by mu
}

type callersKey struct{ node, rule string }

// Translate makes the World of s. What prev, which may be nil, has of it
// already is shared: only services that s has built anew are looked at, and those
// whose routes lead to one of them.
func Translate(prev *Translation, s *lb.Snapshot, pairs certs.Pairs) *Translation {
	t := &Translation{snapshot: s, public: map[string]*publicSet{}}
	from := prev
	if prev == nil || prev.snapshot.Config != s.Config {
		from = nil
	}
	if from != nil && from.snapshot.Routing == s.Routing {
		t.via = from.via
	} else {
		t.via = viaOf(s)
	}
	t.translate(prev, from)
	for _, l := range s.Listeners {
		t.public[l.Spec.Name] = newPublicSet(prev, s, l, secretsOf(l, pairs))
	}
	t.callers = newCallersCache(prev, s.Callers)
	return t
}

// viaOf turns the mesh routes round.
func viaOf(s *lb.Snapshot) map[lb.Key][]lb.Key {
	via := map[lb.Key][]lb.Key{}
	for key, routes := range s.Mesh {
		for _, r := range routes {
			for _, d := range r.To {
				if d.Service != key && !slices.Contains(via[d.Service], key) {
					via[d.Service] = append(via[d.Service], key)
				}
			}
		}
	}
	return via
}

// translate makes the sets of the services. from is prev where its Config is the
// same.
func (t *Translation) translate(prev, from *Translation) {
	var before lb.Table[lb.Key, *serviceSet]
	if prev != nil {
		before = prev.services
	}
	services := before.Edit()
	specs := from == nil
	look := func(key lb.Key) {
		svc, was := t.snapshot.Services.Get(key), before.Get(key)
		specs = specs || svc == nil || was == nil || was.service.Spec != svc.Spec
		if svc == nil {
			services.Delete(key)
			return
		}
		services.Set(key, newServiceSet(was, from != nil, t.snapshot, svc))
	}
	if from == nil {
		for key := range t.snapshot.Services.Keys() {
			look(key)
		}
		for key := range before.Keys() {
			look(key)
		}
	} else {
		for key := range t.snapshot.Services.Differs(from.snapshot.Services) {
			look(key)
			for _, k := range t.via[key] {
				look(k)
			}
		}
		if from.snapshot.Routing != t.snapshot.Routing {
			for key := range before.Keys() {
				look(key)
			}
		}
	}
	t.services = services.Table()
	t.arrange(from, specs)
}

// arrange keeps what is derived from all services. specs says that services have
// come or gone or have another spec than in from.
func (t *Translation) arrange(from *Translation, specs bool) {
	if !specs {
		t.rules, t.ports = from.rules, from.ports
		t.order = slices.Clone(from.order)
		for key := range t.services.Differs(from.services) {
			set := t.services.Get(key)
			at, _ := slices.BinarySearchFunc(t.order, set.prefix, func(s *serviceSet, prefix string) int { return strings.Compare(s.prefix, prefix) })
			t.order[at] = set
		}
		return
	}
	t.rules = map[string]*lb.Service{}
	t.order = make([]*serviceSet, 0, t.services.Len())
	for _, set := range t.services.All() {
		t.order = append(t.order, set)
		t.ports += len(set.service.Ports)
		for _, http := range []bool{false, true} {
			t.rules[callersName(set.service, http)] = set.service
		}
	}
	slices.SortFunc(t.order, func(a, b *serviceSet) int { return strings.Compare(a.prefix, b.prefix) })
}

func newServiceSet(before *serviceSet, sameConfig bool, world *lb.Snapshot, s *lb.Service) *serviceSet {
	mesh := world.Mesh[s.Key]
	reasons := append(reasonsOf(world, mesh), reasonFor(len(s.Endpoints) == 0))
	sameRoutes := before != nil && sameConfig && before.service.Spec == s.Spec && slices.Equal(before.mesh, mesh) && slices.Equal(before.routes.reasons, reasons)
	if sameRoutes && before.service == s {
		return before
	}
	out := &serviceSet{service: s, mesh: mesh, endpoints: endpoints(s)}
	if before != nil {
		out.prefix = before.prefix
	} else {
		out.prefix = s.Key.Service + "." + s.Key.Tenant + ":"
	}
	if before != nil && before.service.Spec == s.Spec && slices.Equal(before.service.Versions, s.Versions) {
		out.clusters = before.clusters
	} else {
		out.clusters = clusters(s)
	}
	if before != nil && sameConfig && before.service.Spec == s.Spec && before.service.SameAddresses(s) {
		out.shapes = before.shapes
	} else {
		out.shapes = newShapes(world.Config, s)
	}
	if sameRoutes {
		out.routes = before.routes
	} else {
		out.routes = newRouteSet(s, mesh, reasons)
	}
	out.proxyless = newProxylessSet(before, out)
	return out
}

// eachPort makes one resource for each port that is served, on demand.
func eachPort(s *lb.Service, encoded func(p *lb.Port) *Resource) *lazy {
	return onDemand(func() []*Resource {
		var out []*Resource
		for i := range s.Ports {
			if s.Ports[i].Protocol == lb.UDP {
				continue
			}
			if r := encoded(&s.Ports[i]); r != nil {
				out = append(out, r)
			}
		}
		slices.SortFunc(out, compareResources)
		return out
	})
}

func newShapes(c *lb.Config, s *lb.Service) *shapes {
	return &shapes{
		sidecar: eachPort(s, func(p *lb.Port) *Resource { return bound(c, s, p, lb.Sidecar, c.CaptureSidecar != lb.CaptureBind) }),
		node:    eachPort(s, func(p *lb.Port) *Resource { return bound(c, s, p, lb.Node, c.CaptureNode != lb.CaptureBind) }),
		dedicated: eachPort(s, func(p *lb.Port) *Resource {
			if !s.Dedicated.IsValid() {
				return nil
			}
			return dedicated(c, s, p)
		}),
	}
}

func newRouteSet(s *lb.Service, mesh []*lb.Route, reasons []string) *routeSet {
	out := &routeSet{reasons: reasons, encoded: eachPort(s, func(p *lb.Port) *Resource {
		if !lb.IsHTTP(p.Protocol) {
			return nil
		}
		return serviceRoutes(s, p, mesh, reasons)
	})}
	out.hosts = hostsOf(out.encoded.get)
	return out
}

// bound is a service port's listener, or nil for a service that the full pool
// has left without an address.
func bound(c *lb.Config, s *lb.Service, p *lb.Port, role lb.Role, captured bool) *Resource {
	if !s.Address.IsValid() {
		return nil
	}
	return outbound(c, s, p, role, captured)
}

func newPublicSet(prev *Translation, s *lb.Snapshot, l *lb.Listener, secrets []secret) *publicSet {
	routes := s.Routes[l.Spec.Name]
	reasons := reasonsOf(s, routes)
	if prev != nil && prev.snapshot.Config == s.Config {
		before := prev.public[l.Spec.Name]
		if before != nil && before.listener == l && slices.Equal(before.routes, routes) && slices.Equal(before.reasons, reasons) && slices.Equal(before.secrets, secrets) {
			return before
		}
	}
	set := &publicSet{listener: l, routes: routes, reasons: reasons, secrets: secrets, encoded: onDemand(func() []*Resource {
		var out []*Resource
		if r := public(s.Config, l, secrets); r != nil {
			out = append(out, r)
		}
		if lb.IsHTTP(l.Spec.Protocol) {
			out = append(out, publicRoutes(l, routes, reasons))
		}
		for _, c := range secrets {
			out = append(out, c.resource())
		}
		return out
	})}
	set.hosts = hostsOf(set.encoded.get)
	return set
}

func newCallersCache(prev *Translation, c *lb.Callers) *callersCache {
	out := &callersCache{callers: c, rules: map[callersKey]*Resource{}}
	if prev == nil {
		return out
	}
	if prev.callers.callers == c {
		return prev.callers
	}
	prev.callers.mu.Lock()
	defer prev.callers.mu.Unlock()
	for k, r := range prev.callers.rules {
		if c.SameOn(prev.callers.callers, k.node) {
			out.rules[k] = r
		}
	}
	return out
}

func (c *callersCache) get(node, rule string) *Resource {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := callersKey{node, rule}
	r, ok := c.rules[key]
	if !ok {
		r = callersRule(c.callers, node, rule)
		c.rules[key] = r
	}
	return r
}

func compareResources(a, b *Resource) int {
	return cmp.Or(cmp.Compare(a.Type, b.Type), strings.Compare(a.Name.Name, b.Name.Name))
}

// Version is the Snapshot's.
func (t *Translation) Version() uint64 { return t.snapshot.Version }

// Snapshot is what the World was made from.
func (t *Translation) Snapshot() *lb.Snapshot { return t.snapshot }

// Since says what differs from prev; nil is a World with nothing in it.
func (t *Translation) Since(prev *Translation) Change {
	if prev == nil || prev.snapshot.Config != t.snapshot.Config {
		return Change{Views: true}
	}
	var c Change
	c.Nodes, c.Views = t.snapshot.Callers.ChangedNodes(prev.snapshot.Callers)
	if c.Views {
		return c
	}
	d := differences{now: t, before: prev, names: map[Name]bool{}}
	for key := range t.services.Differs(prev.services) {
		d.service(t.services.Get(key), prev.services.Get(key))
	}
	for name, set := range t.public {
		d.listener(set, prev.public[name])
	}
	for name, set := range prev.public {
		if t.public[name] == nil {
			d.listener(nil, set)
		}
	}
	c.Names = slices.SortedFunc(maps.Keys(d.names), func(a, b Name) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), strings.Compare(a.Name, b.Name))
	})
	return c
}

// differences collects the names of what differs between two Worlds.
type differences struct {
	now, before *Translation
	names       map[Name]bool
}

// service compares what there is of one service; either may be nil.
func (d *differences) service(now, before *serviceSet) {
	switch {
	case now == nil || before == nil, now.shapes != before.shapes, !sameGrants(now.service, before.service), !slices.Equal(now.mesh, before.mesh):
		// Another view may have it, and what its routes lead to.
		for _, s := range []*serviceSet{now, before} {
			if s != nil {
				d.all(s)
				d.destinations(s.mesh)
			}
		}
		return
	}
	d.resources(now.clusters, before.clusters)
	d.resources(now.endpoints, before.endpoints)
	if !sameZones(before.service, now.service) {
		d.resources(now.endpoints, nil)
	}
	if now.routes != before.routes {
		d.routes(now)
	}
}

func sameGrants(a, b *lb.Service) bool { return slices.Equal(a.Spec.Allow, b.Spec.Allow) }

// resources names those of which only one of the two has this version.
func (d *differences) resources(now, before []*Resource) {
	for i, r := range now {
		if i >= len(before) || before[i].Name != r.Name || before[i].Version != r.Version {
			d.names[r.Name] = true
			if i < len(before) {
				d.names[before[i].Name] = true
			}
		}
	}
	for _, r := range before[min(len(now), len(before)):] {
		d.names[r.Name] = true
	}
}

// all names every resource that a service may have.
func (d *differences) all(s *serviceSet) {
	for _, list := range [][]*Resource{s.clusters, s.endpoints} {
		for _, r := range list {
			d.names[r.Name] = true
		}
	}
	for i := range s.service.Ports {
		name := lb.RouteNameOf(s.service.Key, s.service.Ports[i].Port)
		d.names[Name{Listener, name}] = true
		d.names[Name{Listener, name + DedicatedSuffix}] = true
	}
	for _, t := range proxyless.Targets(s.service) {
		d.names[Name{Listener, t.Name}] = true
	}
	for _, http := range []bool{false, true} {
		d.names[Name{Extension, callersName(s.service, http)}] = true
	}
	d.routes(s)
}

func (d *differences) routes(s *serviceSet) {
	for i := range s.service.Ports {
		d.names[Name{Route, lb.RouteNameOf(s.service.Key, s.service.Ports[i].Port)}] = true
	}
}

// destinations names the clusters that routes lead to.
func (d *differences) destinations(routes []*lb.Route) {
	for _, r := range routes {
		for _, to := range r.To {
			for _, t := range []*Translation{d.now, d.before} {
				if s := t.services.Get(to.Service); s != nil {
					d.all(s)
				}
			}
		}
	}
}

// listener compares what there is of one public listener; either may be nil.
func (d *differences) listener(now, before *publicSet) {
	if now == before {
		return
	}
	for _, p := range []*publicSet{now, before} {
		if p == nil {
			continue
		}
		d.names[Name{Listener, p.listener.Spec.Name}] = true
		d.names[Name{Route, p.listener.Spec.Name}] = true
		for _, s := range p.secrets {
			d.names[Name{Secret, s.name}] = true
		}
		if now == nil || before == nil || now.listener != before.listener || !slices.Equal(now.routes, before.routes) {
			d.destinations(p.routes)
		}
	}
}

// Everything lists all that a proxy of this identity ends up with: clusters,
// listeners, and by following them their endpoints, routes, rules and secrets.
func (t *Translation) Everything(id lb.Identity) iter.Seq[*Resource] {
	return func(yield func(*Resource) bool) {
		v := t.View(Proxy{Identity: id})
		seen := map[Name]bool{}
		var follow func(r *Resource) bool
		follow = func(r *Resource) bool {
			if r == nil || seen[r.Name] {
				return true
			}
			seen[r.Name] = true
			if !yield(r) {
				return false
			}
			for _, n := range r.Refs {
				if !follow(v.Get(n)) {
					return false
				}
			}
			return true
		}
		for _, wildcard := range []Type{Cluster, Listener} {
			for r := range v.All(wildcard) {
				if !follow(r) {
					return
				}
			}
		}
	}
}
