package envoy

import (
	"maps"
	"slices"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/proxyless"
)

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
	c.Names = slices.SortedFunc(maps.Keys(d.names), compareNames)
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
