package lb

import (
	"cmp"
	"slices"
	"strings"
)

// Routes are matched by specificity. This file is the one place that says so;
// the translation to Envoy and Explain both use its order.
//
//  1. the host: exact, then the longest wildcard (*.example.com), then any;
//  2. the path: exact, then regex (longest text first), then the longest prefix;
//  3. more conditions on headers, query and method first;
//  4. the route's name.

// VirtualHost is every route that a request for one host pattern may take, in
// match order. Routes of a wider pattern follow those of a narrower one, so
// that a request falls through to them.
type VirtualHost struct {
	Domain string // shop.example.com, *.example.com or *
	Routes []*Route
}

// AnyHost is the host pattern that matches every host.
const AnyHost = "*"

// VirtualHosts groups the routes of one listener by host pattern, the most
// specific pattern first.
func VirtualHosts(routes []*Route) []*VirtualHost {
	var domains []string
	for _, r := range routes {
		domains = append(domains, r.hosts()...)
	}
	slices.SortFunc(domains, compareHosts)
	domains = slices.Compact(domains)
	out := make([]*VirtualHost, 0, len(domains))
	for _, d := range domains {
		v := &VirtualHost{Domain: d}
		for _, r := range routes {
			if r.covering(d) != "" {
				v.Routes = append(v.Routes, r)
			}
		}
		slices.SortStableFunc(v.Routes, func(a, b *Route) int {
			return cmp.Or(compareHosts(a.covering(d), b.covering(d)), compareRoutes(a, b))
		})
		out = append(out, v)
	}
	return out
}

// sortRoutes puts the routes of one listener in the order in which they are
// listed, and numbers them.
func sortRoutes(routes []*Route) {
	slices.SortStableFunc(routes, func(a, b *Route) int {
		return cmp.Or(compareHosts(slices.MinFunc(a.hosts(), compareHosts), slices.MinFunc(b.hosts(), compareHosts)), compareRoutes(a, b))
	})
	for i, r := range routes {
		r.Order = i + 1
	}
}

func (r *Route) hosts() []string {
	if len(r.Hosts) == 0 {
		return []string{AnyHost}
	}
	return r.Hosts
}

// covering is the most specific of r's host patterns that matches everything
// that domain matches; "" when none does.
func (r *Route) covering(domain string) string {
	best := ""
	for _, h := range r.hosts() {
		if hostCovers(h, domain) && (best == "" || compareHosts(h, best) < 0) {
			best = h
		}
	}
	return best
}

func hostCovers(pattern, domain string) bool {
	if pattern == domain || pattern == AnyHost {
		return true
	}
	suffix, wild := strings.CutPrefix(pattern, "*")
	return wild && strings.HasSuffix(strings.TrimPrefix(domain, "*"), suffix) && len(domain) > len(suffix)
}

func compareHosts(a, b string) int {
	return cmp.Or(cmp.Compare(hostClass(a), hostClass(b)), -cmp.Compare(len(a), len(b)), strings.Compare(a, b))
}

func hostClass(h string) int {
	switch {
	case h == AnyHost:
		return 2
	case strings.HasPrefix(h, "*"):
		return 1
	}
	return 0
}

func compareRoutes(a, b *Route) int {
	return cmp.Or(
		boolOrder(a.Implicit, b.Implicit),
		cmp.Compare(pathClass(a.Match), pathClass(b.Match)),
		-cmp.Compare(len(pathText(a.Match)), len(pathText(b.Match))),
		-cmp.Compare(conditions(a.Match), conditions(b.Match)),
		strings.Compare(a.Name, b.Name),
	)
}

func boolOrder(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

func pathClass(m Match) int {
	switch {
	case m.Path != "":
		return 0
	case m.PathRegex != "":
		return 1
	}
	return 2
}

func pathText(m Match) string { return cmp.Or(m.Path, m.PathRegex, m.PathPrefix, "/") }

func conditions(m Match) int {
	n := len(m.Headers) + len(m.Query)
	if len(m.Methods) > 0 {
		n++
	}
	return n
}

// OwnRoute is the implicit route of a port: to the service itself.
func (s *Service) OwnRoute(p *Port) *Route {
	name := RouteNameOf(s.Key, p.Port)
	return &Route{Name: name, Tenant: s.Key.Tenant, Listener: name, Timeout: s.Spec.Timeout, Retry: s.Spec.Retry, Origin: s.Spec.Origin, Implicit: true,
		To: []Destination{{Target: Target{Service: s.Key, Port: p.Name, Weight: 1}, Cluster: p.Cluster, Resolved: true}}}
}

// PortRoutes are the routes of one port of a service's own address in match
// order: those declared for the mesh, then the service itself.
func (s *Snapshot) PortRoutes(svc *Service, p *Port) []*Route {
	own := svc.OwnRoute(p)
	if !IsHTTP(p.Protocol) {
		return []*Route{own}
	}
	out := make([]*Route, 0, len(s.Mesh[svc.Key])+1)
	for _, r := range s.Mesh[svc.Key] {
		declared := *r
		declared.Listener = own.Listener
		out = append(out, &declared)
	}
	return append(out, own)
}
