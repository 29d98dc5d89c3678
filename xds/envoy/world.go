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
	"slices"
	"strings"
	"sync"

	"github.com/roostmesh/roost/certs"
	"github.com/roostmesh/roost/lb"
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

func compareResources(a, b *Resource) int { return compareNames(a.Name, b.Name) }

func compareNames(a, b Name) int {
	return cmp.Or(cmp.Compare(a.Type, b.Type), strings.Compare(a.Name, b.Name))
}

// Version is the Snapshot's.
func (t *Translation) Version() uint64 { return t.snapshot.Version }

// Snapshot is what the World was made from.
func (t *Translation) Snapshot() *lb.Snapshot { return t.snapshot }

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
