package envoy

import (
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/roostmesh/roost/lb"
)

// View is what a proxy may hold.
func (t *Translation) View(p Proxy) View {
	if p.Role == lb.Proxyless {
		return proxylessView{t.view(p)}
	}
	return t.view(p)
}

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
			return find(s.routes.encoded(), n)
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
