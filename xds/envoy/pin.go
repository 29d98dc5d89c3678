package envoy

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"

	"github.com/roostmesh/roost/lb"
)

// Pin keeps a resource at an earlier version for as long as what is built is the
// one that proxies refuse. It is immutable.
type Pin struct {
	Name
	Refused string    // the version that is built
	Good    *Resource // what proxies are given in its place; nil: nothing
	leads   []lead
}

// lead is a service that a pinned route configuration leads to, by a route of a
// tenant: the one that the route says, or that the whole table belongs to.
type lead struct {
	tenant string
	to     lb.Key
}

// NewPin makes a Pin; an error says that the earlier version cannot be read.
func NewPin(n Name, refused string, good *Resource) (*Pin, error) {
	p := &Pin{Name: n, Refused: refused}
	if good == nil {
		return p, nil
	}
	m, err := good.Message()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", n.Type, n.Name, err)
	}
	if routes, ok := m.(*routev3.RouteConfiguration); ok {
		p.leads = leadsOf(routes)
	}
	r := *good
	r.InPlaceOf = refused
	p.Good = &r
	return p, nil
}

func leadsOf(c *routev3.RouteConfiguration) (out []lead) {
	for _, host := range c.GetVirtualHosts() {
		for _, r := range host.GetRoutes() {
			tenant := cmp.Or(r.GetMetadata().GetFilterMetadata()[metadataKey].GetFields()["tenant"].GetStringValue(), ServiceOf(c.GetName()).Tenant)
			names := []string{r.GetRoute().GetCluster()}
			for _, c := range r.GetRoute().GetWeightedClusters().GetClusters() {
				names = append(names, c.GetName())
			}
			for _, name := range names {
				if l := (lead{tenant, ServiceOf(name)}); name != "" && !slices.Contains(out, l) {
					out = append(out, l)
				}
			}
		}
	}
	return out
}

// lawful says that the routes of the earlier version may still lead where they
// do: a grant that was taken back since is not brought back. A service that is
// gone is answered for with 503, as for every route.
func (p *Pin) lawful(s *lb.Snapshot) bool {
	return !slices.ContainsFunc(p.leads, func(l lead) bool {
		svc := s.Services.Get(l.to)
		return svc != nil && !svc.Allows(l.tenant, "")
	})
}

// Keeps are the versions of instances that Pins lead to: their clusters are to be
// built although no route may name them any more.
func Keeps(pins []*Pin) map[lb.Key][]string {
	out := map[lb.Key][]string{}
	for _, p := range pins {
		for n := range p.clusters() {
			if _, version, ok := strings.Cut(n, "@"); ok {
				key := ServiceOf(n)
				out[key] = append(out[key], version)
			}
		}
	}
	for key, versions := range out {
		slices.Sort(versions)
		out[key] = slices.Compact(versions)
	}
	return out
}

// clusters are those that the earlier version refers to.
func (p *Pin) clusters() iter.Seq[string] {
	return func(yield func(string) bool) {
		if p.Good == nil {
			return
		}
		for _, n := range p.Good.Refs {
			if n.Type == Cluster && !yield(n.Name) {
				return
			}
		}
	}
}

// Replaces says why the good version may not stand in the place of the built one,
// for people. A listener stays where it is, leads nowhere else and needs nothing
// else.
func Replaces(good, built *Resource) (why string) {
	if good.Type != Listener {
		return ""
	}
	a, err1 := good.Message()
	b, err2 := built.Message()
	was, ok1 := a.(*listenerv3.Listener)
	is, ok2 := b.(*listenerv3.Listener)
	if err1 != nil || err2 != nil || !ok1 || !ok2 {
		return "its earlier version cannot be read"
	}
	same := slices.EqualFunc(was.GetAdditionalAddresses(), is.GetAdditionalAddresses(), func(a, b *listenerv3.AdditionalAddress) bool { return proto.Equal(a.GetAddress(), b.GetAddress()) })
	if !same || !proto.Equal(was.GetAddress(), is.GetAddress()) {
		return "its earlier version is on another address"
	}
	for _, n := range good.Refs {
		if !slices.Contains(built.Refs, n) {
			return fmt.Sprintf("its earlier version needs %s %s, and it is not to any more", n.Type, n.Name)
		}
	}
	return ""
}

// Built finds a version of a resource that some proxy would be given, or nil.
func (t *Translation) Built(n Name, version string) *Resource {
	var lists [][]*Resource
	if s := t.services.Get(ServiceOf(n.Name)); s != nil {
		switch n.Type {
		case Cluster:
			lists = [][]*Resource{s.clusters, s.proxyless.clusters.get()}
		case Listener:
			lists = [][]*Resource{s.shapes.sidecar.get(), s.shapes.node.get(), s.shapes.dedicated.get(), s.proxyless.listeners.get()}
		case Route:
			lists = [][]*Resource{s.routes.encoded.get(), s.proxyless.routes.get()}
		}
	}
	if p := t.public[n.Name]; p != nil {
		lists = append(lists, p.encoded.get())
	}
	for _, list := range lists {
		if r := find(list, n); r != nil && r.Version == version {
			return r
		}
	}
	return nil
}

// Pinned is a World with Pins laid over it.
type Pinned struct {
	world *Translation
	pins  map[pinKey]*Pin   // those in force
	keeps map[string][]*Pin // by the clusters that they refer to
}

type pinKey struct {
	Name
	refused string
}

// Pinned lays Pins over a World. Those whose refused version is not what is built
// any more do nothing.
func (t *Translation) Pinned(pins []*Pin) *Pinned {
	w := &Pinned{world: t}
	for _, p := range pins {
		if !p.lawful(t.snapshot) {
			continue
		}
		if w.pins == nil {
			w.pins, w.keeps = map[pinKey]*Pin{}, map[string][]*Pin{}
		}
		w.pins[pinKey{p.Name, p.Refused}] = p
		for n := range p.clusters() {
			w.keeps[n] = append(w.keeps[n], p)
		}
	}
	return w
}

// Lawful says that a Pin does something where its refused version is built.
func (w *Pinned) Lawful(p *Pin) bool { return w.pins[pinKey{p.Name, p.Refused}] == p }

// Version is that of the World below.
func (w *Pinned) Version() uint64 { return w.world.Version() }

// View is what a proxy may hold. Without Pins it is the World's own.
func (w *Pinned) View(p Proxy) View {
	v := w.world.View(p)
	if len(w.pins) == 0 {
		return v
	}
	return &pinnedView{View: v, w: w, proxyless: p.Role == lb.Proxyless}
}

// Since says what differs from prev; nil is a World with nothing in it.
func (w *Pinned) Since(prev *Pinned) Change {
	if prev == nil {
		return w.world.Since(nil)
	}
	c := w.world.Since(prev.world)
	if c.Views || len(w.pins)+len(prev.pins) == 0 {
		return c
	}
	names := map[Name]bool{}
	for _, n := range c.Names {
		names[n] = true
	}
	for _, pins := range []map[pinKey]*Pin{w.pins, prev.pins} {
		for key, p := range pins {
			if w.pins[key] != prev.pins[key] || p.concerned(c.Names) {
				names[p.Name] = true
				for n := range p.clusters() {
					names[Name{Cluster, n}], names[Name{Endpoint, n}] = true, true
				}
			}
		}
	}
	c.Names = slices.SortedFunc(maps.Keys(names), compareNames)
	return c
}

// concerned says whether one of the names decides on what the Pin does.
func (p *Pin) concerned(names []Name) bool {
	return slices.ContainsFunc(names, func(n Name) bool {
		return n == p.Name || p.Good != nil && n.Type != Endpoint && slices.Contains(p.Good.Refs, n)
	})
}

// pinnedView is a view of a World with Pins.
type pinnedView struct {
	View
	w         *Pinned
	proxyless bool
}

// Get implements View.
func (v *pinnedView) Get(n Name) *Resource {
	r := v.View.Get(n)
	if r == nil {
		return v.kept(n)
	}
	return v.replaced(r)
}

// replaced is what a Pin has put in the place of what is built.
func (v *pinnedView) replaced(r *Resource) *Resource {
	if p := v.w.pins[pinKey{r.Name, r.Version}]; p != nil && v.whole(p) {
		return p.Good
	}
	return r
}

// whole says that what the earlier version needs to work at all is there: its
// routes, rules and secrets.
func (v *pinnedView) whole(p *Pin) bool {
	return p.Good == nil || !slices.ContainsFunc(p.Good.Refs, func(n Name) bool {
		return n.Type != Cluster && n.Type != Endpoint && v.View.Get(n) == nil
	})
}

// kept is a cluster, or its endpoints, that the proxy holds only because a pinned
// version refers to it.
func (v *pinnedView) kept(n Name) *Resource {
	if n.Type != Cluster && n.Type != Endpoint {
		return nil
	}
	for _, p := range v.w.keeps[n.Name] {
		parent := v.View.Get(p.Name)
		s := v.w.world.services.Get(ServiceOf(n.Name))
		if parent == nil || parent.Version != p.Refused || s == nil || !v.whole(p) {
			continue
		}
		if r := find(v.childrenOf(s, n.Type), n); r != nil {
			return v.replaced(r)
		}
	}
	return nil
}

// childrenOf are the clusters of a service, or their endpoints, in the client's
// form.
func (v *pinnedView) childrenOf(s *serviceSet, t Type) []*Resource {
	switch {
	case v.proxyless && t == Cluster:
		return s.proxyless.clusters.get()
	case v.proxyless:
		return s.proxyless.endpoints.get()
	case t == Cluster:
		return s.clusters
	}
	return s.endpoints
}

// All implements View.
func (v *pinnedView) All(t Type) iter.Seq[*Resource] {
	var list []*Resource
	for r := range v.View.All(t) {
		if r = v.replaced(r); r != nil {
			list = append(list, r)
		}
	}
	before := len(list)
	for name := range v.w.keeps {
		n := Name{t, name}
		if v.View.Get(n) != nil {
			continue
		}
		if r := v.kept(n); r != nil {
			list = append(list, r)
		}
	}
	if len(list) > before {
		slices.SortFunc(list, compareResources)
	}
	return slices.Values(list)
}
