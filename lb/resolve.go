package lb

import (
	"fmt"
	"slices"
	"strings"

	"github.com/roostmesh/roost/discovery"
)

// resolver turns declared listeners and routes into what is served, and what
// cannot be served into Problems.
type resolver struct {
	s *Snapshot
	*Routing
	listeners map[string]*Listener
}

func (r *resolver) run() *Routing {
	r.Routing = &Routing{Routes: map[string][]*Route{}, Mesh: map[Key][]*Route{}}
	for _, spec := range r.s.Config.Listeners {
		if spec.Protocol == UDP || spec.Protocol == TLS {
			r.problem("protocol_unsupported", "listener "+spec.Name, spec.Origin, fmt.Sprintf("protocol %s is not served yet", spec.Protocol), "use http, https or tcp")
			continue
		}
		l := &Listener{Spec: spec}
		r.listeners[spec.Name] = l
		r.Listeners = append(r.Listeners, l)
	}
	slices.SortFunc(r.Listeners, func(a, b *Listener) int { return strings.Compare(a.Spec.Name, b.Spec.Name) })
	for _, l := range r.Listeners {
		if from := r.listeners[l.Spec.RedirectFrom]; from != nil {
			from.RedirectsTo = l
		}
	}
	for _, spec := range r.s.Config.Routes {
		r.route(spec)
	}
	for _, l := range r.Listeners {
		sortRoutes(r.Routes[l.Spec.Name])
	}
	for _, routes := range r.Mesh {
		sortRoutes(routes)
	}
	return r.Routing
}

func (r *resolver) problem(code, object, place, message, fix string) {
	r.refused = append(r.refused, Problem{Code: code, Severity: discovery.SeverityError, Object: object, Place: place, Message: message, Fix: fix})
}

func (r *resolver) route(spec *RouteSpec) {
	object := "route " + spec.Name
	if !r.hostsAllowed(spec) {
		return
	}
	base := Route{Name: spec.Name, Tenant: spec.Tenant, Hosts: spec.Hosts, Match: spec.Match, Timeout: spec.Timeout, Retry: spec.Retry, Origin: spec.Origin}
	for _, t := range spec.To {
		d, ok := r.destination(spec, t)
		if !ok {
			return
		}
		base.To = append(base.To, d)
	}
	if len(spec.Listeners) == 0 {
		key := spec.To[0].Service
		if r.s.Services.Get(key) == nil {
			return // destination has said so
		}
		route := base
		route.Listener = key.String()
		r.Mesh[key] = append(r.Mesh[key], &route)
		return
	}
	for _, name := range spec.Listeners {
		l := r.listeners[name]
		if l == nil {
			r.problem("route_unknown_listener", object, spec.Origin, fmt.Sprintf("there is no listener %q", name), "declare it under listeners, or name one that exists")
			continue
		}
		route := base
		route.Listener = name
		if !IsHTTP(l.Spec.Protocol) {
			if l.Target != nil {
				r.problem("route_conflict", object, spec.Origin, fmt.Sprintf("listener %s is %s and already goes to route %s", name, l.Spec.Protocol, l.Target.Name), "give each tcp listener one route")
				continue
			}
			l.Target = &route
		}
		r.Routes[name] = append(r.Routes[name], &route)
	}
}

// destination finds a target's cluster. A service that does not exist is a
// Problem and an empty cluster: requests get a clear 503, not another route.
func (r *resolver) destination(spec *RouteSpec, t Target) (Destination, bool) {
	object := "route " + spec.Name
	svc := r.s.Services.Get(t.Service)
	if svc == nil {
		r.problem("route_unknown_service", object, spec.Origin, fmt.Sprintf("goes to service %s, which does not exist; its share is answered with 503", t.Service),
			fmt.Sprintf("declare the service, register an instance of it, or run `roost service create %s --port PORT`", t.Service))
		return Destination{Target: t, Cluster: ClusterName(t.Service, "unknown", "")}, true
	}
	if !svc.Allows(spec.Tenant, "") {
		r.problem("route_not_allowed", object, spec.Origin, fmt.Sprintf("tenant %s may not call %s; the route is left out", spec.Tenant, t.Service),
			fmt.Sprintf("add `allow: [%s]` to the service", spec.Tenant))
		return Destination{}, false
	}
	port, ok := r.port(svc, t.Port)
	if !ok {
		r.problem("route_unknown_port", object, spec.Origin, fmt.Sprintf("service %s has no port %q; it has %s", t.Service, t.Port, portNames(svc.Ports)), "name a port of the service")
		return Destination{}, false
	}
	t.Port = port.Name
	return Destination{Target: t, Cluster: ClusterName(t.Service, port.Name, t.Version), Resolved: true}, true
}

func (r *resolver) port(svc *Service, name string) (*Port, bool) {
	if name == "" {
		for n := range svc.Ports {
			if IsHTTP(svc.Ports[n].Protocol) {
				return &svc.Ports[n], true
			}
		}
	}
	return svc.PortNamed(name)
}

func (r *resolver) hostsAllowed(spec *RouteSpec) bool {
	for _, h := range spec.Hosts {
		for _, t := range r.s.Config.Tenants {
			covered := slices.ContainsFunc(t.Hosts, func(p string) bool { return hostCovers(p, h) })
			switch {
			case t.Name == spec.Tenant && len(t.Hosts) > 0 && !covered:
				r.problem("host_not_allowed", "route "+spec.Name, spec.Origin, fmt.Sprintf("tenant %s may not use host %s (its hosts: %s); the route is left out", spec.Tenant, h, strings.Join(t.Hosts, ", ")),
					"use one of the tenant's hosts, or extend tenants."+t.Name+".hosts")
				return false
			case t.Name != spec.Tenant && covered:
				r.problem("host_not_allowed", "route "+spec.Name, spec.Origin, fmt.Sprintf("host %s belongs to tenant %s; the route is left out", h, t.Name),
					"use another host, or change tenants."+t.Name+".hosts")
				return false
			}
		}
	}
	return true
}
