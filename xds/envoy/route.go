package envoy

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	previousv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/roostmesh/roost/lb"
)

// ReasonHeader tells why Envoy itself has answered.
const ReasonHeader = "x-roost-reason"

const (
	defaultTimeout = 15 * time.Second
	// safeMethods change nothing, so that they may be sent again even when the
	// instance had begun to answer.
	safeMethods    = "GET|HEAD|OPTIONS"
	retryAny       = "connect-failure,refused-stream,reset-before-request"
	retrySafe      = retryAny + ",reset"
	retryAttempts  = 2
	hostAttempts   = 5
	retryBase      = 5 * time.Millisecond
	retryMax       = 100 * time.Millisecond
	statusNotFound = 404
)

// serviceRoutes is the route configuration of one HTTP port of a service:
// declared mesh routes in match order, then the service itself.
func serviceRoutes(s *lb.Service, p *lb.Port, mesh []*lb.Route, reasons []string) *Resource {
	name := lb.RouteNameOf(s.Key, p.Port)
	routes := append(slices.Clone(mesh), s.OwnRoute(p))
	why := whyOf(routes, reasons)
	var hosts []*routev3.VirtualHost
	for _, v := range lb.VirtualHosts(routes) {
		hosts = append(hosts, virtualHost(v, p.Protocol, why, nil))
	}
	return encode(Route, name, &routev3.RouteConfiguration{Name: name, VirtualHosts: hosts, IgnorePortInHostMatching: true}, clusterRefs(routes)...)
}

// publicRoutes is the route configuration of a public listener.
func publicRoutes(l *lb.Listener, routes []*lb.Route, reasons []string) *Resource {
	why := whyOf(routes, reasons)
	rest := notFound("no_host")
	if to := l.RedirectsTo; to != nil {
		rest = redirect(to)
	}
	var hosts []*routev3.VirtualHost
	catchAll := false
	for _, v := range lb.VirtualHosts(routes) {
		catchAll = catchAll || v.Domain == lb.AnyHost
		last := notFound("no_route")
		if l.RedirectsTo != nil {
			last = rest
		}
		hosts = append(hosts, virtualHost(v, l.Spec.Protocol, why, last))
	}
	if !catchAll {
		hosts = append(hosts, &routev3.VirtualHost{Name: lb.AnyHost, Domains: []string{lb.AnyHost}, Routes: []*routev3.Route{rest}})
	}
	name := l.Spec.Name
	return encode(Route, name, &routev3.RouteConfiguration{Name: name, VirtualHosts: hosts, IgnorePortInHostMatching: true}, clusterRefs(routes)...)
}

func clusterRefs(routes []*lb.Route) []Name {
	var refs []Name
	for _, r := range routes {
		for _, d := range r.To {
			if n := (Name{Cluster, d.Cluster}); d.Resolved && !slices.Contains(refs, n) {
				refs = append(refs, n)
			}
		}
	}
	return refs
}

// The reasons why a route's clusters may have no endpoint to send to. Which one
// it is stands with the route, so that Envoy's own answer can say it.
const (
	reasonNone    = lb.NoEndpoint
	reasonHealthy = lb.NoHealthyEndpoint
)

func reasonFor(empty bool) string {
	if empty {
		return reasonNone
	}
	return reasonHealthy
}

// reasonsOf are the reasons of each route: whether all that it leads to is
// without an instance.
func reasonsOf(s *lb.Snapshot, routes []*lb.Route) []string {
	out := make([]string, 0, len(routes)+1)
	for _, r := range routes {
		empty := true
		for _, d := range r.To {
			svc := s.Services.Get(d.Service)
			empty = empty && (d.Weight == 0 || svc == nil || !slices.ContainsFunc(svc.Endpoints, func(e *lb.Endpoint) bool {
				return d.Version == "" || e.Instance.Version == d.Version
			}))
		}
		out = append(out, reasonFor(empty))
	}
	return out
}

func whyOf(routes []*lb.Route, reasons []string) map[*lb.Route]string {
	out := make(map[*lb.Route]string, len(routes))
	for i, r := range routes {
		out[r] = reasons[i]
	}
	return out
}

func virtualHost(v *lb.VirtualHost, protocol string, why map[*lb.Route]string, last *routev3.Route) *routev3.VirtualHost {
	out := &routev3.VirtualHost{Name: v.Domain, Domains: []string{v.Domain}, IncludeAttemptCountInResponse: false}
	for _, r := range v.Routes {
		out.Routes = append(out.Routes, routesOf(r, protocol, why[r])...)
	}
	if last != nil {
		out.Routes = append(out.Routes, last)
	}
	return out
}

// routesOf are the entries of one route: a retry policy holds for a whole
// entry, so that safe methods, which are sent again more freely, have their own.
func routesOf(r *lb.Route, protocol, why string) []*routev3.Route {
	if r.Retry != nil {
		return []*routev3.Route{entry(r, protocol, why, match(r.Match), customRetry(r.Retry))}
	}
	safe := match(r.Match)
	safe.Headers = append(safe.Headers, header(":method", &matcherv3.StringMatcher{MatchPattern: regex(safeMethods)}, false))
	return []*routev3.Route{
		entry(r, protocol, why, safe, retry(retrySafe)),
		entry(r, protocol, why, match(r.Match), retry(retryAny)),
	}
}

func entry(r *lb.Route, protocol, why string, m *routev3.RouteMatch, retry *routev3.RetryPolicy) *routev3.Route {
	action := &routev3.RouteAction{RetryPolicy: retry, Timeout: seconds(cmp.Or(r.Timeout, defaultTimeout)), ClusterNotFoundResponseCode: routev3.RouteAction_SERVICE_UNAVAILABLE}
	if r.Timeout == 0 && protocol == lb.GRPC {
		// A gRPC stream lives as long as the caller's deadline says.
		action.Timeout = seconds(0)
		action.MaxStreamDuration = &routev3.RouteAction_MaxStreamDuration{GrpcTimeoutHeaderMax: seconds(0)}
	}
	destinations(action, r.To)
	says := "has no running instance"
	if why == reasonHealthy {
		says = "has instances, but none takes traffic"
	}
	return &routev3.Route{Name: r.Name, Match: m, Action: &routev3.Route_Route{Route: action}, Metadata: metadata("tenant", r.Tenant, "reason", why, "says", says)}
}

func destinations(action *routev3.RouteAction, to []lb.Destination) {
	if len(to) == 1 {
		action.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: to[0].Cluster}
		return
	}
	w := &routev3.WeightedCluster{}
	for _, d := range to {
		w.Clusters = append(w.Clusters, &routev3.WeightedCluster_ClusterWeight{Name: d.Cluster, Weight: wrapperspb.UInt32(d.Weight)})
	}
	action.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: w}
}

func retry(on string) *routev3.RetryPolicy {
	return &routev3.RetryPolicy{
		RetryOn: on, NumRetries: u32(retryAttempts), HostSelectionRetryMaxAttempts: hostAttempts,
		RetryBackOff: &routev3.RetryPolicy_RetryBackOff{BaseInterval: seconds(retryBase), MaxInterval: seconds(retryMax)},
		RetryHostPredicate: []*routev3.RetryPolicy_RetryHostPredicate{{
			Name:       "envoy.retry_host_predicates.previous_hosts",
			ConfigType: &routev3.RetryPolicy_RetryHostPredicate_TypedConfig{TypedConfig: pack(&previousv3.PreviousHostsPredicate{})},
		}},
	}
}

func customRetry(r *lb.Retry) *routev3.RetryPolicy {
	if len(r.On) == 0 || r.Attempts == 0 {
		return nil
	}
	on, codes := "", []uint32(nil)
	for _, c := range r.On {
		if status, err := strconv.ParseUint(c, 10, 32); err == nil {
			codes = append(codes, uint32(status))
			c = "retriable-status-codes"
			if len(codes) > 1 {
				continue
			}
		}
		if on != "" {
			on += ","
		}
		on += c
	}
	p := retry(on)
	p.NumRetries, p.RetriableStatusCodes = u32(r.Attempts), codes
	return p
}

func match(m lb.Match) *routev3.RouteMatch {
	out := &routev3.RouteMatch{}
	switch {
	case m.Path != "":
		out.PathSpecifier = &routev3.RouteMatch_Path{Path: m.Path}
	case m.PathRegex != "":
		out.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: m.PathRegex}}
	default:
		out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: cmp.Or(m.PathPrefix, "/")}
	}
	if len(m.Methods) == 1 {
		out.Headers = append(out.Headers, header(":method", exact(m.Methods[0]), false))
	} else if len(m.Methods) > 1 {
		out.Headers = append(out.Headers, header(":method", &matcherv3.StringMatcher{MatchPattern: regex(strings.Join(m.Methods, "|"))}, false))
	}
	for _, h := range m.Headers {
		out.Headers = append(out.Headers, header(h.Name, text(h), h.Invert))
	}
	for _, q := range m.Query {
		p := &routev3.QueryParameterMatcher{Name: q.Name, QueryParameterMatchSpecifier: &routev3.QueryParameterMatcher_PresentMatch{PresentMatch: true}}
		if t := text(q); t != nil {
			p.QueryParameterMatchSpecifier = &routev3.QueryParameterMatcher_StringMatch{StringMatch: t}
		}
		out.QueryParameters = append(out.QueryParameters, p)
	}
	return out
}

func header(name string, value *matcherv3.StringMatcher, invert bool) *routev3.HeaderMatcher {
	h := &routev3.HeaderMatcher{Name: name, InvertMatch: invert, TreatMissingHeaderAsEmpty: invert && value != nil, HeaderMatchSpecifier: &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}}
	if value != nil {
		h.HeaderMatchSpecifier = &routev3.HeaderMatcher_StringMatch{StringMatch: value}
	}
	return h
}

func text(v lb.ValueMatch) *matcherv3.StringMatcher {
	switch {
	case v.Exact != "":
		return exact(v.Exact)
	case v.Prefix != "":
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: v.Prefix}}
	case v.Regex != "":
		return &matcherv3.StringMatcher{MatchPattern: regex(v.Regex)}
	}
	return nil
}

func exact(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: s}}
}

func regex(s string) *matcherv3.StringMatcher_SafeRegex {
	return &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: s}}
}

// notFound answers what no route matches, and says which part did not.
func notFound(reason string) *routev3.Route {
	what := "no host"
	if reason == "no_route" {
		what = "no route of this host"
	}
	return &routev3.Route{
		Name: reason, Match: match(lb.Match{}),
		Action: &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: statusNotFound,
			Body: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: what + " matches this request\n"}}}},
		ResponseHeadersToAdd: []*corev3.HeaderValueOption{addHeader(ReasonHeader, reason)},
	}
}

// redirect sends plain requests to the https listener.
func redirect(to *lb.Listener) *routev3.Route {
	r := &routev3.RedirectAction{SchemeRewriteSpecifier: &routev3.RedirectAction_HttpsRedirect{HttpsRedirect: true}, ResponseCode: routev3.RedirectAction_PERMANENT_REDIRECT}
	if port := RedirectPort(to); port != httpsPort {
		r.PortRedirect = uint32(port)
	}
	return &routev3.Route{Name: "redirect to " + to.Spec.Name, Match: match(lb.Match{}), Action: &routev3.Route_Redirect{Redirect: r}}
}

const httpsPort = 443

// RedirectPort is the port that clients are redirected to.
func RedirectPort(to *lb.Listener) uint16 {
	return cmp.Or(to.Spec.ExternalPort, to.Spec.Address.Port())
}

func addHeader(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: name, Value: value}, AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD}
}
