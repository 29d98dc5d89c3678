package envoy

import (
	"iter"
	"slices"
	"sync"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/proxyless"
)

// proxylessSet is every resource of one service in the form that gRPC takes,
// each made when the first gRPC client asks for it, and shared by all of them.
type proxylessSet struct {
	clusters, endpoints, listeners, routes *lazy
}

// newProxylessSet shares what set shares with before, which may be nil.
func newProxylessSet(before, set *serviceSet) *proxylessSet {
	s, mesh := set.service, set.mesh
	out := &proxylessSet{endpoints: onDemand(func() []*Resource {
		return eachCluster(s, func(port int, version, name string) *Resource {
			return encode(Endpoint, name, proxyless.Assignment(s, port, version, name))
		})
	})}
	if before != nil && before.service.Spec == s.Spec && slices.Equal(before.service.Versions, s.Versions) {
		out.clusters = before.proxyless.clusters
	} else {
		out.clusters = onDemand(func() []*Resource {
			return eachCluster(s, func(_ int, _, name string) *Resource {
				return encode(Cluster, name, proxyless.Cluster(s, name), Name{Endpoint, name})
			})
		})
	}
	if before != nil && before.service.Spec == s.Spec {
		out.listeners = before.proxyless.listeners
	} else {
		out.listeners = onDemand(func() []*Resource {
			var list []*Resource
			for _, t := range proxyless.Targets(s) {
				list = append(list, encode(Listener, t.Name, proxyless.Listener(s, t), Name{Route, lb.RouteNameOf(s.Key, t.Port.Port)}))
			}
			return list
		})
	}
	if before != nil && before.service.Spec == s.Spec && slices.Equal(before.mesh, mesh) {
		out.routes = before.proxyless.routes
	} else {
		out.routes = eachPort(s, func(p *lb.Port) *Resource {
			m, clusters := proxyless.Routes(s, p, mesh)
			var refs []Name
			for _, c := range clusters {
				refs = append(refs, Name{Cluster, c})
			}
			return encode(Route, m.Name, m, refs...)
		})
	}
	return out
}

// eachCluster makes one resource for each cluster of a service.
func eachCluster(s *lb.Service, encoded func(port int, version, name string) *Resource) []*Resource {
	var out []*Resource
	for i := range s.Ports {
		for _, version := range append([]string{""}, s.Versions...) {
			out = append(out, encoded(i, version, lb.ClusterName(s.Key, s.Ports[i].Name, version)))
		}
	}
	return out
}

// sameZones says that both versions of a service have their endpoints in the
// same zones, which Envoy's form does not show.
func sameZones(a, b *lb.Service) bool {
	return slices.EqualFunc(a.Endpoints, b.Endpoints, func(x, y *lb.Endpoint) bool { return x.Instance.Zone == y.Instance.Zone })
}

// absent are the cluster in the place of those that do not exist, and its
// endpoints.
var absent = sync.OnceValue(func() []*Resource {
	return []*Resource{
		encode(Cluster, proxyless.Absent, proxyless.AbsentCluster(), Name{Endpoint, proxyless.Absent}),
		encode(Endpoint, proxyless.Absent, proxyless.AbsentEndpoints()),
	}
})

// proxylessView is what a gRPC client may hold: the same services as a sidecar.
type proxylessView struct{ *view }

// Get returns a resource by name, or nil where this client has none.
func (v proxylessView) Get(n Name) *Resource {
	if n.Name == proxyless.Absent {
		return find(absent(), n)
	}
	s := v.world.services.Get(ServiceOf(n.Name))
	if s == nil {
		return nil
	}
	switch {
	case n.Type == Cluster && v.holds(s):
		return find(s.proxyless.clusters.get(), n)
	case n.Type == Endpoint && v.holds(s):
		return find(s.proxyless.endpoints.get(), n)
	case n.Type == Listener && v.sees(s):
		return find(s.proxyless.listeners.get(), n)
	case n.Type == Route && v.sees(s):
		return find(s.proxyless.routes.get(), n)
	}
	return nil
}

// All lists the resources of a wildcard type, or the endpoints, ordered by name.
func (v proxylessView) All(t Type) iter.Seq[*Resource] {
	var list []*Resource
	for _, s := range v.world.order {
		switch {
		case t == Cluster && v.holds(s):
			list = append(list, s.proxyless.clusters.get()...)
		case t == Endpoint && v.holds(s):
			list = append(list, s.proxyless.endpoints.get()...)
		case t == Listener && v.sees(s):
			list = append(list, s.proxyless.listeners.get()...)
		}
	}
	for _, r := range absent() {
		if r.Type == t {
			list = append(list, r)
		}
	}
	slices.SortFunc(list, compareResources)
	return slices.Values(list)
}
