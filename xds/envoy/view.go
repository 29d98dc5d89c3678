package envoy

import (
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"

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
	return &view{world: t, id: p.Identity, most: p.MaxListeners, sight: t.snapshot.SightOf(p.Identity)}
}

// Beyond counts the listeners that a proxy should have and is not given,
// because its file descriptors would run out.
func (t *Translation) Beyond(p Proxy) int { return len(t.view(p).cutOff()) }

type view struct {
	world *Translation
	id    lb.Identity
	sight lb.Sight
	most  int // listeners; 0: no limit

	// beyond are the listeners left out; nil in nearly every proxy, and until the
	// first look at listeners.
	once   sync.Once
	beyond map[string]bool
}

// cutOff are the listeners that are left out.
func (v *view) cutOff() map[string]bool {
	v.once.Do(func() {
		if v.most > 0 && v.most < v.atMost() {
			v.beyond = v.cut(v.most)
		}
	})
	return v.beyond
}

// atMost is cheap to know and no less than the view's number of listeners.
func (v *view) atMost() int {
	return len(v.world.public) + 1 + v.world.ports
}

// cut lists the listeners beyond the first limit ones by name; the capture
// listener, without which none works, is always kept.
func (v *view) cut(limit int) map[string]bool {
	out := map[string]bool{}
	for _, r := range v.list(Listener) {
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

// Limited says that the proxy is given fewer listeners than it should have.
func (v *view) Limited() bool { return len(v.cutOff()) > 0 }

func (v *view) sees(s *serviceSet) bool { return v.sight.Sees(s.service) }

// holds tells whether the proxy holds the service's clusters.
func (v *view) holds(s *serviceSet) bool {
	if v.sees(s) {
		return true
	}
	return slices.ContainsFunc(v.world.via[s.service.Key], func(k lb.Key) bool {
		from := v.world.services.Get(k)
		return from != nil && v.sees(from)
	})
}

func (v *view) listeners(s *serviceSet) []*Resource {
	switch v.id.Role {
	case lb.Sidecar:
		return s.shapes.sidecar.get()
	case lb.Node:
		return s.shapes.node.get()
	default:
		return s.shapes.dedicated.get()
	}
}

func (v *view) captured() bool {
	c := v.world.snapshot.Config
	return v.id.Role == lb.Sidecar && c.CaptureSidecar != lb.CaptureBind || v.id.Role == lb.Node && c.CaptureNode != lb.CaptureBind
}

// Get returns a resource by name, or nil where this proxy has none.
func (v *view) Get(n Name) *Resource {
	if n.Type == Listener && v.cutOff()[n.Name] {
		return nil
	}
	if n.Type == VirtualHost {
		return v.host(n)
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
	if s := v.world.services.Get(ServiceOf(n.Name)); s != nil {
		return v.ofService(s, n)
	}
	return v.ofPublic(n)
}

// knowsRule keeps what a proxy may ask for to rules that services have: a name
// costs memory.
func (v *view) knowsRule(name string) bool {
	s := v.world.rules[name]
	return s != nil && v.sight.Sees(s)
}

// ServiceOf reads the service from a resource's name: SERVICE.TENANT:...
func ServiceOf(name string) lb.Key {
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
			return find(s.routes.encoded.get(), n)
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
	return find(p.encoded.get(), n)
}

func find(list []*Resource, n Name) *Resource {
	for _, r := range list {
		if r.Name == n {
			return r
		}
	}
	return nil
}

// All lists the resources of a wildcard type, or the endpoints, ordered by name.
func (v *view) All(t Type) iter.Seq[*Resource] {
	list := v.list(t)
	if t == Listener && v.Limited() {
		list = slices.DeleteFunc(list, func(r *Resource) bool { return v.beyond[r.Name.Name] })
	}
	return slices.Values(list)
}

// list is All without a limit.
func (v *view) list(t Type) []*Resource {
	var list []*Resource
	for _, s := range v.world.order {
		switch {
		case t == Cluster && v.holds(s):
			list = append(list, s.clusters...)
		case t == Endpoint && v.holds(s):
			list = append(list, s.endpoints...)
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
	if !slices.IsSortedFunc(list, compareResources) {
		slices.SortFunc(list, compareResources)
	}
	return list
}
