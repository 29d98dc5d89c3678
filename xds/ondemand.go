package xds

import "github.com/roostmesh/roost/xds/envoy"

// get is what the client is to have under a name: what the view has, or for what
// it asks for on demand a placeholder. Of a name that it is not subscribed to
// there is no placeholder.
func (s *state) get(n envoy.Name) *envoy.Resource {
	if r := s.view.Get(n); r != nil {
		return r
	}
	return s.standIn(n)
}

// standIn is what a client in delta form is sent in the place of a virtual host, or
// a cluster that it names, which its view does not have, and of the endpoints of
// such a cluster; nil for everything else. A client of the state of the world gets
// to know that there is nothing.
func (s *state) standIn(n envoy.Name) *envoy.Resource {
	if s.sotw {
		return nil
	}
	switch n.Type {
	case envoy.Cluster, envoy.Endpoint:
		if !s.types[envoy.Cluster].named.has(n.Name) {
			return nil
		}
	case envoy.VirtualHost:
	default:
		return nil
	}
	if last := s.types[n.Type].last(n.Name); last != nil && last.Body != nil && isStandIn(last) {
		return last // which spares making it once more
	}
	return envoy.Placeholder(n)
}

// markHosts notes that the virtual hosts of changed routes may differ from what the
// client has.
func (s *state) markHosts(changes []envoy.Change, since uint64) {
	if !s.types[envoy.VirtualHost].started {
		return
	}
	routes := map[string]bool{}
	for _, c := range changes {
		for _, n := range c.Names {
			if n.Type == envoy.Route {
				routes[n.Name] = true
			}
		}
	}
	if len(routes) == 0 {
		return
	}
	for _, name := range s.names(envoy.VirtualHost) {
		if route, _ := envoy.RouteOf(name); routes[route] {
			s.mark(envoy.VirtualHost, name, since)
		}
	}
}

func isStandIn(r *envoy.Resource) bool { return r.Version == envoy.PlaceholderVersion }

// renamed notes that a name of a cluster has been subscribed to, or is not any
// more: there is a placeholder of it and of its endpoints, or there is none. Where
// the cluster itself is sent, its endpoints follow anyway.
func (s *state) renamed(t envoy.Type, name string) {
	if t == envoy.Cluster && !s.sotw {
		s.mark(envoy.Cluster, name, s.version)
		s.mark(envoy.Endpoint, name, s.version)
	}
}
