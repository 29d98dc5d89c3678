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
	mesh      []*lb.Route
	clusters  []*Resource
	endpoints []*Resource
	shapes    *shapes
}

// shapes are the resources that do not depend on instances, made on demand.
type shapes struct {
	sidecar, node, dedicated, routes func() []*Resource
}

// publicSet is every resource of one public listener.
type publicSet struct {
	listener *lb.Listener
	routes   []*lb.Route
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
		set := newServiceSet(before, sameConfig, s.Config, svc, s.Mesh[svc.Key])
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
	slices.SortFunc(t.order, func(a, b *serviceSet) int { return strings.Compare(sortName(a), sortName(b)) })
}

func sortName(s *serviceSet) string { return s.service.Key.Service + "." + s.service.Key.Tenant + ":" }

func newServiceSet(before *serviceSet, sameConfig bool, c *lb.Config, s *lb.Service, mesh []*lb.Route) *serviceSet {
	if before != nil && sameConfig && before.service == s && slices.Equal(before.mesh, mesh) {
		return before
	}
	out := &serviceSet{service: s, mesh: mesh}
	if before != nil && before.service.Spec == s.Spec && slices.Equal(before.service.Versions, s.Versions) {
		out.clusters = before.clusters
	} else {
		out.clusters = clusters(s)
	}
	out.endpoints = endpoints(s)
	if before != nil && sameConfig && before.service.Spec == s.Spec && slices.Equal(before.mesh, mesh) && before.service.SameAddresses(s) {
		out.shapes = before.shapes
	} else {
		out.shapes = newShapes(c, s, mesh)
	}
	return out
}

func newShapes(c *lb.Config, s *lb.Service, mesh []*lb.Route) *shapes {
	each := func(encoded func(p *lb.Port) *Resource) func() []*Resource {
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
	return &shapes{
		sidecar: each(func(p *lb.Port) *Resource { return bound(c, s, p, lb.Sidecar, c.CaptureSidecar != lb.CaptureBind) }),
		node:    each(func(p *lb.Port) *Resource { return bound(c, s, p, lb.Node, c.CaptureNode != lb.CaptureBind) }),
		dedicated: each(func(p *lb.Port) *Resource {
			if !s.Dedicated.IsValid() {
				return nil
			}
			return dedicated(c, s, p)
		}),
		routes: each(func(p *lb.Port) *Resource {
			if !lb.IsHTTP(p.Protocol) {
				return nil
			}
			return serviceRoutes(s, p, mesh)
		}),
	}
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
	if prev != nil && prev.snapshot.Config == s.Config {
		before := prev.public[l.Spec.Name]
		if before != nil && before.listener == l && slices.Equal(before.routes, routes) && slices.Equal(before.secrets, secrets) {
			return before
		}
	}
	return &publicSet{listener: l, routes: routes, secrets: secrets, encoded: sync.OnceValue(func() []*Resource {
		var out []*Resource
		if r := public(s.Config, l, secrets); r != nil {
			out = append(out, r)
		}
		if lb.IsHTTP(l.Spec.Protocol) {
			out = append(out, publicRoutes(l, routes))
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
		case before == nil || before.shapes != set.shapes || !slices.Equal(before.clusters, set.clusters):
			c.Views = true
		default:
			for i, r := range set.endpoints {
				if i >= len(before.endpoints) || before.endpoints[i].Version != r.Version {
					c.Names = append(c.Names, r.Name)
				}
			}
		}
	}
	for name, set := range t.public {
		c.Views = c.Views || prev.public[name] != set
	}
	return c
}

// View is what a proxy may hold.
func (t *Translation) View(p Proxy) View { return t.view(p) }

func (t *Translation) view(p Proxy) *view {
	v := &view{world: t, id: p.Identity, sight: t.snapshot.SightOf(p.Identity)}
	if p.MaxListeners > 0 && p.MaxListeners < v.atMost() {
		v.beyond = v.cut(p.MaxListeners)
	}
	return v
}

// Beyond counts the listeners that a proxy should have and is not given,
// because its file descriptors would run out.
func (t *Translation) Beyond(p Proxy) int { return len(t.view(p).beyond) }

type view struct {
	world *Translation
	id    lb.Identity
	sight lb.Sight
	// beyond are the listeners left out; nil in nearly every proxy.
	beyond map[string]bool
}

// atMost is cheap to know and no less than the view's number of listeners.
func (v *view) atMost() int {
	n := len(v.world.public) + 1
	for _, s := range v.world.order {
		n += len(s.service.Ports)
	}
	return n
}

// cut lists the listeners beyond the first limit ones by name; the capture
// listener, without which none works, is always kept.
func (v *view) cut(limit int) map[string]bool {
	out := map[string]bool{}
	for r := range v.All(Listener) {
		switch {
		case r.Name.Name == CaptureListener:
		case limit > 0:
			limit--
		default:
			out[r.Name.Name] = true
		}
	}
	return out
}

func (v *view) sees(s *serviceSet) bool { return v.sight.Sees(s.service) }

// holds tells whether the proxy holds the service's clusters.
func (v *view) holds(s *serviceSet) bool {
	if v.sees(s) {
		return true
	}
	return slices.ContainsFunc(v.world.via[s.service.Key], func(k lb.Key) bool {
		from := v.world.services[k]
		return from != nil && v.sees(from)
	})
}

func (v *view) listeners(s *serviceSet) []*Resource {
	switch v.id.Role {
	case lb.Sidecar:
		return s.shapes.sidecar()
	case lb.Node:
		return s.shapes.node()
	default:
		return s.shapes.dedicated()
	}
}

func (v *view) captured() bool {
	c := v.world.snapshot.Config
	return v.id.Role == lb.Sidecar && c.CaptureSidecar != lb.CaptureBind || v.id.Role == lb.Node && c.CaptureNode != lb.CaptureBind
}

// Get returns a resource by name, or nil where this proxy has none.
func (v *view) Get(n Name) *Resource {
	if n.Type == Listener && v.beyond[n.Name] {
		return nil
	}
	if n.Type == Extension {
		if v.id.Role != lb.Node || !v.knowsRule(n.Name) {
			return nil
		}
		return v.world.callers.get(v.id.Node, n.Name)
	}
	if n == (Name{Listener, CaptureListener}) {
		if v.captured() {
			return capture(v.id.Role)
		}
		return nil
	}
	if s := v.world.services[serviceOf(n.Name)]; s != nil {
		return v.ofService(s, n)
	}
	return v.ofPublic(n)
}

// knowsRule keeps what a proxy may ask for to rules that services have: a name
// costs memory.
func (v *view) knowsRule(name string) bool {
	tenant, _, http, ok := parseCallers(name)
	if !ok {
		return false
	}
	return slices.ContainsFunc(v.world.order, func(s *serviceSet) bool {
		return s.service.Key.Tenant == tenant && v.sees(s) && callersName(s.service, http) == name
	})
}

// serviceOf reads the service from a resource's name: SERVICE.TENANT:...
func serviceOf(name string) lb.Key {
	head, _, _ := strings.Cut(name, ":")
	service, tenant, _ := strings.Cut(head, ".")
	return lb.Key{Tenant: tenant, Service: service}
}

func (v *view) ofService(s *serviceSet, n Name) *Resource {
	switch n.Type {
	case Cluster, Endpoint:
		if !v.holds(s) {
			return nil
		}
		if n.Type == Cluster {
			return find(s.clusters, n)
		}
		return find(s.endpoints, n)
	case Listener:
		if v.sees(s) {
			return find(v.listeners(s), n)
		}
	case Route:
		if v.sees(s) {
			return find(s.shapes.routes(), n)
		}
	}
	return nil
}

func (v *view) ofPublic(n Name) *Resource {
	if v.id.Role != lb.Gateway {
		return nil
	}
	name := n.Name
	if n.Type == Secret {
		name, _, _ = strings.Cut(name, ":")
	}
	p := v.world.public[name]
	if p == nil || p.listener.Spec.Gateway != v.id.Group {
		return nil
	}
	return find(p.encoded(), n)
}

func find(list []*Resource, n Name) *Resource {
	for _, r := range list {
		if r.Name == n {
			return r
		}
	}
	return nil
}

// All lists the resources of a wildcard type, ordered by name.
func (v *view) All(t Type) iter.Seq[*Resource] {
	var list []*Resource
	for _, s := range v.world.order {
		switch {
		case t == Cluster && v.holds(s):
			list = append(list, s.clusters...)
		case t == Listener && v.sees(s):
			list = append(list, v.listeners(s)...)
		}
	}
	if t == Listener {
		for _, name := range slices.Sorted(maps.Keys(v.world.public)) {
			if r := v.ofPublic(Name{Listener, name}); r != nil {
				list = append(list, r)
			}
		}
		if v.captured() {
			list = append(list, capture(v.id.Role))
		}
	}
	slices.SortFunc(list, compareResources)
	if t == Listener && len(v.beyond) > 0 {
		list = slices.DeleteFunc(list, func(r *Resource) bool { return v.beyond[r.Name.Name] })
	}
	return slices.Values(list)
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
