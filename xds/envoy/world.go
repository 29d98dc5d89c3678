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
	services map[lb.Key]*serviceSet
	order    []*serviceSet // by the names of their resources
	public   map[string]*publicSet
	// via lists the services whose mesh routes lead to a service: who sees one
	// of them holds its clusters, too.
	via     map[lb.Key][]lb.Key
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
	sidecar, node, dedicated func() []*Resource
}

// routeSet is a service's route configurations, made on demand.
type routeSet struct {
	reasons []string // of the mesh routes, then of the service itself
	encoded func() []*Resource
}

// publicSet is every resource of one public listener.
type publicSet struct {
	listener *lb.Listener
	routes   []*lb.Route
	reasons  []string // of the routes
	secrets  []secret
	encoded  func() []*Resource // the listener first where it can be served, its routes, its secrets
}

// callersCache keeps the rules of each node; they are made on demand.
type callersCache struct {
	callers *lb.Callers
	mu      sync.Mutex
	rules   map[callersKey]*Resource // guarded by mu
}

type callersKey struct{ node, rule string }

// Translate makes the World of s. What prev, which may be nil, has of it
// already is shared.
func Translate(prev *Translation, s *lb.Snapshot, pairs certs.Pairs) *Translation {
	t := &Translation{snapshot: s, services: make(map[lb.Key]*serviceSet, len(s.Order)), public: map[string]*publicSet{}, via: map[lb.Key][]lb.Key{}}
	sameConfig := prev != nil && prev.snapshot.Config == s.Config
	known := true
	for _, svc := range s.Order {
		var before *serviceSet
		if prev != nil {
			before = prev.services[svc.Key]
		}
		set := newServiceSet(before, sameConfig, s, svc)
		t.services[svc.Key] = set
		known = known && before != nil
	}
	t.arrange(prev, known && prev != nil && len(prev.services) == len(t.services))
	for _, l := range s.Listeners {
		t.public[l.Spec.Name] = newPublicSet(prev, s, l, secretsOf(l, pairs))
	}
	for key, routes := range s.Mesh {
		for _, r := range routes {
			for _, d := range r.To {
				if d.Service != key && !slices.Contains(t.via[d.Service], key) {
					t.via[d.Service] = append(t.via[d.Service], key)
				}
			}
		}
	}
	t.callers = newCallersCache(prev, s.Callers)
	return t
}

// arrange puts the services in the order of their resources' names; same says
// that it is the order of prev.
func (t *Translation) arrange(prev *Translation, same bool) {
	t.order = make([]*serviceSet, 0, len(t.services))
	if same {
		for _, before := range prev.order {
			t.order = append(t.order, t.services[before.service.Key])
		}
		return
	}
	for _, set := range t.services {
		t.order = append(t.order, set)
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
func eachPort(s *lb.Service, encoded func(p *lb.Port) *Resource) func() []*Resource {
	return sync.OnceValue(func() []*Resource {
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
	return &routeSet{reasons: reasons, encoded: eachPort(s, func(p *lb.Port) *Resource {
		if !lb.IsHTTP(p.Protocol) {
			return nil
		}
		return serviceRoutes(s, p, mesh, reasons)
	})}
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
	return &publicSet{listener: l, routes: routes, reasons: reasons, secrets: secrets, encoded: sync.OnceValue(func() []*Resource {
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
	if prev == nil {
		return Change{Views: true}
	}
	var c Change
	c.Nodes, c.Views = t.snapshot.Callers.ChangedNodes(prev.snapshot.Callers)
	c.Views = c.Views || len(t.services) != len(prev.services) || len(t.public) != len(prev.public)
	for key, set := range t.services {
		before := prev.services[key]
		switch {
		case before == set:
		case before == nil || before.shapes != set.shapes || !slices.Equal(before.clusters, set.clusters) || !slices.Equal(before.mesh, set.mesh):
			c.Views = true
		default:
			c.Names = append(c.Names, set.changed(before)...)
		}
	}
	for name, set := range t.public {
		before := prev.public[name]
		switch {
		case before == set:
		case before != nil && before.listener == set.listener && slices.Equal(before.routes, set.routes) && slices.Equal(before.secrets, set.secrets):
			c.Names = append(c.Names, Name{Route, name}) // only its reasons have
		default:
			c.Views = true
		}
	}
	return c
}

// changed names what instances that came, went or moved have changed.
func (s *serviceSet) changed(before *serviceSet) []Name {
	var out []Name
	moved := !sameZones(before.service, s.service)
	for i, r := range s.endpoints {
		if moved || i >= len(before.endpoints) || before.endpoints[i].Version != r.Version {
			out = append(out, r.Name)
		}
	}
	if s.routes != before.routes {
		for i := range s.service.Ports {
			out = append(out, Name{Route, lb.RouteNameOf(s.service.Key, s.service.Ports[i].Port)})
		}
	}
	return out
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
