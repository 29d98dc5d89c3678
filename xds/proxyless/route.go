package proxyless

import (
	"cmp"
	"slices"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/roostmesh/roost/lb"
)

const (
	// method is that of every gRPC call.
	method = "POST"
	// maxAlternatives bounds the entries that one route becomes.
	maxAlternatives = 16
)

// Routes is the route configuration of one port of a service: declared mesh
// routes in match order, then the service itself. Conditions that no gRPC call
// can meet, a query parameter or another method than POST, leave a route out.
func Routes(s *lb.Service, p *lb.Port, mesh []*lb.Route) (*routev3.RouteConfiguration, []string) {
	routes := []*lb.Route{s.OwnRoute(p)}
	if lb.IsHTTP(p.Protocol) {
		routes = append(slices.Clone(mesh), routes...)
	}
	out := &routev3.RouteConfiguration{Name: lb.RouteNameOf(s.Key, p.Port)}
	var clusters []string
	for _, v := range lb.VirtualHosts(routes) {
		host := &routev3.VirtualHost{Name: v.Domain, Domains: domains(v.Domain)}
		for _, r := range v.Routes {
			entries := entries(r)
			host.Routes = append(host.Routes, entries...)
			if len(entries) > 0 {
				clusters = append(clusters, names(r.To)...)
			}
		}
		out.VirtualHosts = append(out.VirtualHosts, host)
	}
	slices.Sort(clusters)
	return out, slices.Compact(clusters)
}

// domains are the patterns of a host with and without a port: gRPC compares what
// was dialled as it was written.
func domains(host string) []string {
	if strings.HasPrefix(host, "*") {
		return []string{host}
	}
	return []string{host, host + ":*"}
}

func entries(r *lb.Route) []*routev3.Route {
	if len(r.Match.Query) > 0 || len(r.Match.Methods) > 0 && !slices.Contains(r.Match.Methods, method) {
		return nil
	}
	action := destinations(r.To)
	if action == nil {
		return nil
	}
	if r.Timeout > 0 {
		action.MaxStreamDuration = &routev3.RouteAction_MaxStreamDuration{MaxStreamDuration: durationpb.New(r.Timeout)}
	}
	action.RetryPolicy = retry(r.Retry)
	var out []*routev3.Route
	for _, headers := range alternatives(r.Match.Headers) {
		m := path(r.Match)
		m.Headers = headers
		out = append(out, &routev3.Route{Name: r.Name, Match: m, Action: &routev3.Route_Route{Route: action}})
	}
	return out
}

func path(m lb.Match) *routev3.RouteMatch {
	switch {
	case m.Path != "":
		return &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Path{Path: m.Path}}
	case m.PathRegex != "":
		return &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: m.PathRegex}}}
	}
	return &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: cmp.Or(m.PathPrefix, "/")}}
}

// alternatives are the sets of conditions of which one is to be met. A header
// that must not have a value may be missing, which gRPC does not take for that:
// it becomes two alternatives.
func alternatives(headers []lb.ValueMatch) [][]*routev3.HeaderMatcher {
	out := [][]*routev3.HeaderMatcher{nil}
	for _, h := range headers {
		ways := []*routev3.HeaderMatcher{header(h)}
		if h.Invert && text(h) != nil {
			ways = append(ways, header(lb.ValueMatch{Name: h.Name, Invert: true}))
		}
		var next [][]*routev3.HeaderMatcher
		for _, before := range out {
			for _, w := range ways {
				next = append(next, append(slices.Clone(before), w))
			}
		}
		if out = next; len(out) > maxAlternatives {
			return nil
		}
	}
	return out
}

func header(h lb.ValueMatch) *routev3.HeaderMatcher {
	out := &routev3.HeaderMatcher{Name: h.Name, InvertMatch: h.Invert, HeaderMatchSpecifier: &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}}
	if t := text(h); t != nil {
		out.HeaderMatchSpecifier = &routev3.HeaderMatcher_StringMatch{StringMatch: t}
	}
	return out
}

func text(v lb.ValueMatch) *matcherv3.StringMatcher {
	switch {
	case v.Exact != "":
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: v.Exact}}
	case v.Prefix != "":
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: v.Prefix}}
	case v.Regex != "":
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: v.Regex}}}
	}
	return nil
}

// names are the clusters of destinations that get calls.
func names(to []lb.Destination) []string {
	var out []string
	for _, d := range to {
		switch {
		case d.Weight == 0 && len(to) > 1:
		case d.Resolved:
			out = append(out, d.Cluster)
		default:
			out = append(out, Absent)
		}
	}
	return out
}

// destinations is nil where no destination has a weight, which gRPC refuses.
func destinations(to []lb.Destination) *routev3.RouteAction {
	clusters := names(to)
	switch len(clusters) {
	case 0:
		return nil
	case 1:
		return &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: clusters[0]}}
	}
	w := &routev3.WeightedCluster{}
	for _, d := range to {
		if d.Weight > 0 {
			w.Clusters = append(w.Clusters, &routev3.WeightedCluster_ClusterWeight{Name: names([]lb.Destination{d})[0], Weight: wrapperspb.UInt32(d.Weight)})
		}
	}
	return &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_WeightedClusters{WeightedClusters: w}}
}

// codesOf are the gRPC codes that a condition of Envoy shows as to the caller.
// The conditions that gRPC knows under their own name are in it, too.
var codesOf = map[string]string{
	"cancelled": "cancelled", "deadline-exceeded": "deadline-exceeded", "internal": "internal", "resource-exhausted": "resource-exhausted", "unavailable": "unavailable",
	"connect-failure": "unavailable", "refused-stream": "unavailable", "reset": "unavailable", "reset-before-request": "unavailable", "gateway-error": "unavailable", "5xx": "unavailable",
	"429": "unavailable", "502": "unavailable", "503": "unavailable", "504": "unavailable", "http3-post-connect-failure": "unavailable",
}

// retry is nil where the service says nothing: what never reached an instance is
// sent again by gRPC itself, and no more than that is safe for every call.
func retry(r *lb.Retry) *routev3.RetryPolicy {
	if r == nil || r.Attempts == 0 {
		return nil
	}
	var on []string
	for _, c := range r.On {
		if code := codesOf[c]; code != "" && !slices.Contains(on, code) {
			on = append(on, code)
		}
	}
	if len(on) == 0 {
		return nil
	}
	slices.Sort(on)
	return &routev3.RetryPolicy{RetryOn: strings.Join(on, ","), NumRetries: wrapperspb.UInt32(r.Attempts)}
}
