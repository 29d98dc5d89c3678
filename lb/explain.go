package lb

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Outcomes of an explanation.
const (
	Routed            = "routed"
	Redirected        = "redirected"
	DirectResponse    = "direct_response"
	NoListener        = "no_listener"
	NoHost            = "no_host"
	NoRoute           = "no_route"
	NoEndpoint        = "no_endpoint"
	NoHealthyEndpoint = "no_healthy_endpoint"
	Denied            = "denied"
)

// Question is a request to explain.
type Question struct {
	URL     string
	Method  string
	Headers map[string]string // by lower-case name; host is the URL's where it is absent
	// From is who asks: the zero View asks as the operator, who sees all.
	From     *View
	Listener string // only this public listener
}

// Explanation says where a request goes and why.
type Explanation struct {
	Outcome     string           `json:"outcome"`
	Why         string           `json:"why"`
	Listener    *string          `json:"listener"`
	VirtualHost *string          `json:"virtual_host"`
	Route       *string          `json:"route"`
	Cluster     *string          `json:"cluster"`
	To          []WeightedTarget `json:"to"`
	Endpoints   []EndpointState  `json:"endpoints"`
	Policy      *string          `json:"policy"`
	Location    *string          `json:"location"`
	Considered  []Considered     `json:"considered"`
	Steps       []Step           `json:"steps"`
	Origin      *string          `json:"origin"`

	// Clusters, Role and Group say which proxies carry the request.
	Clusters []string `json:"-"`
	Role     Role     `json:"-"`
	Group    string   `json:"-"`
	Target   *Service `json:"-"`
}

// WeightedTarget is one destination of a split.
type WeightedTarget struct {
	Service string `json:"service"`
	Version string `json:"version"`
	Weight  uint32 `json:"weight"`
	Cluster string `json:"cluster"`
}

// EndpointState is one instance as the load balancer sees it.
type EndpointState struct {
	ID      string  `json:"id"`
	Cluster string  `json:"cluster"`
	Address *string `json:"address"`
	Node    string  `json:"node"`
	Version string  `json:"version"`
	Weight  uint32  `json:"weight"`
	Health  string  `json:"health"`
	Serving bool    `json:"serving"`
	Reason  string  `json:"reason"`
	Origin  string  `json:"origin"`
}

// Considered is a route that was looked at, in match order.
type Considered struct {
	Route   string `json:"route"`
	Matched bool   `json:"matched"`
	Reason  string `json:"reason"`
}

// Step is one thing that must be so for a request inside the mesh to arrive.
type Step struct {
	Name   string `json:"name"` // identity dns listener endpoint ack
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

func text(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

type explainer struct {
	s    *Snapshot
	q    Question
	url  *url.URL
	port uint16
	out  Explanation
}

// Explain says where s sends a request. The error tells of a URL that cannot be
// asked about.
func (s *Snapshot) Explain(q Question) (*Explanation, error) {
	if !strings.Contains(q.URL, "://") {
		q.URL = "http://" + q.URL
	}
	u, err := url.Parse(q.URL)
	if err != nil {
		return nil, fmt.Errorf("url: %w", err)
	}
	if !slices.Contains([]string{"http", "https", "grpc", "tcp", "tls"}, u.Scheme) || u.Hostname() == "" {
		return nil, fmt.Errorf("url %q: want http://HOST/PATH, https://..., grpc://... or tcp://HOST:PORT", q.URL)
	}
	q.Method = cmp.Or(strings.ToUpper(q.Method), "GET")
	headers := map[string]string{}
	maps.Copy(headers, q.Headers)
	headers["host"] = cmp.Or(headers["host"], u.Host)
	q.Headers = headers
	e := &explainer{s: s, q: q, url: u}
	e.out = Explanation{To: []WeightedTarget{}, Endpoints: []EndpointState{}, Considered: []Considered{}, Steps: []Step{}}
	if p := u.Port(); p != "" {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("url %q: %s is no port", q.URL, p)
		}
		e.port = uint16(n)
	}
	if q.Listener == "" && e.inside() {
		return &e.out, nil
	}
	e.public()
	return &e.out, nil
}

func (e *explainer) end(outcome, why string) { e.out.Outcome, e.out.Why = outcome, why }

// inside explains a request to a service's own or dedicated address, and tells
// whether the host names one.
func (e *explainer) inside() bool {
	host := strings.TrimSuffix(strings.ToLower(e.url.Hostname()), ".")
	var svc *Service
	dedicated := false
	if a, err := netip.ParseAddr(host); err == nil {
		var ok bool
		if svc, ok = e.s.ServiceAt(a); !ok {
			return false
		}
		dedicated = a == svc.Dedicated
	} else {
		rest, ours := strings.CutSuffix(host, "."+e.s.Config.Domain)
		if !ours {
			return false
		}
		labels := strings.Split(rest, ".")
		if len(labels) == 3 && labels[2] == "dedicated" {
			dedicated, labels = true, labels[:2]
		}
		if len(labels) != 2 {
			e.step("dns", false, host+" does not exist: NXDOMAIN; a service is SERVICE.TENANT."+e.s.Config.Domain)
			e.end(NoHost, "the name does not exist")
			return true
		}
		svc = e.s.Services.Get(Key{Tenant: labels[1], Service: labels[0]})
		if svc == nil || dedicated && !svc.Dedicated.IsValid() {
			e.step("dns", false, host+" does not exist: NXDOMAIN; nobody has declared or registered this service")
			e.end(NoHost, "no such service")
			return true
		}
	}
	e.out.Target = svc
	if !e.identity(svc, dedicated) {
		return true
	}
	e.arrive(svc, dedicated)
	return true
}

func (e *explainer) step(name string, ok bool, detail string) {
	e.out.Steps = append(e.out.Steps, Step{name, ok, detail})
}

func (e *explainer) identity(svc *Service, dedicated bool) bool {
	e.out.Role = Node
	address := svc.Address
	if dedicated {
		e.out.Role, address = Gateway, svc.Dedicated
	}
	if e.q.From != nil && !dedicated {
		v := *e.q.From
		if v.Kind == ViewNobody {
			e.step("identity", false, "nobody: "+v.Why)
			e.end(Denied, "the caller is nobody, so that the service does not exist for it: "+v.Why)
			return false
		}
		e.step("identity", true, v.String()+": "+v.Why)
		if !v.Sees(svc) {
			e.step("dns", false, fmt.Sprintf("NXDOMAIN: %s may not call %s", v, svc.Key))
			e.end(Denied, fmt.Sprintf("tenant %s may not call %s; its `allow` grants it to %s", v, svc.Key, grants(svc)))
			return false
		}
	} else {
		e.step("identity", true, "any caller that may call the service")
	}
	if !address.IsValid() {
		e.step("dns", false, "the service has no address: its pool is full")
		e.end(NoListener, "the service has no address: its pool is full")
		return false
	}
	e.step("dns", true, svc.Domain+" is "+address.String())
	return true
}

func grants(s *Service) string {
	if len(s.Spec.Allow) == 0 {
		return "nobody outside its tenant"
	}
	var out []string
	for _, g := range s.Spec.Allow {
		out = append(out, g.String())
	}
	return strings.Join(out, ", ")
}

func (e *explainer) arrive(svc *Service, dedicated bool) {
	port, ok := e.servicePort(svc)
	if !ok {
		e.step("listener", false, fmt.Sprintf("%s has no port %d; it has %s", svc.Key, e.port, dialled(svc)))
		e.end(NoListener, fmt.Sprintf("service %s has no such port; it has %s", svc.Key, dialled(svc)))
		return
	}
	name := RouteNameOf(svc.Key, port.Port)
	if dedicated {
		name += "@dedicated"
	}
	e.out.Listener = &name
	e.step("listener", true, fmt.Sprintf("%s, %s", name, port.Protocol))
	routes := e.s.PortRoutes(svc, port)
	if !IsHTTP(port.Protocol) {
		e.take(routes[0])
		return
	}
	e.match(routes, nil)
}

func dialled(s *Service) string {
	var out []string
	for _, p := range s.Ports {
		out = append(out, fmt.Sprintf("%d/%s", p.Port, p.Protocol))
	}
	return strings.Join(out, ", ")
}

func (e *explainer) servicePort(svc *Service) (*Port, bool) {
	if e.port != 0 {
		return svc.Port(e.port)
	}
	for i := range svc.Ports {
		if p := &svc.Ports[i]; e.url.Scheme == "http" && p.Port == 80 || e.url.Scheme == "https" && p.Port == 443 {
			return p, true
		}
	}
	if len(svc.Ports) == 1 {
		return &svc.Ports[0], true
	}
	for i := range svc.Ports {
		if p := &svc.Ports[i]; IsHTTP(p.Protocol) == (e.url.Scheme != "tcp" && e.url.Scheme != "tls") {
			return p, true
		}
	}
	return nil, false
}

// public explains a request to a gateway's public listener.
func (e *explainer) public() {
	e.out.Role = Gateway
	candidates, why := e.listeners()
	if len(candidates) == 0 {
		e.end(NoListener, why)
		return
	}
	var first *Explanation
	for _, l := range candidates {
		e.out.Considered, e.out.Why = []Considered{}, why
		e.out.Listener, e.out.Group, e.out.Origin = text(l.Spec.Name), l.Spec.Gateway, text(l.Spec.Origin)
		e.onListener(l)
		if why != "" {
			e.out.Why = strings.TrimSuffix(why+"; "+e.out.Why, "; ")
		}
		if e.out.Outcome != NoHost && e.out.Outcome != NoRoute {
			return
		}
		if first == nil {
			kept := e.out
			first = &kept
		}
	}
	e.out = *first
}

// listeners are those that the URL's port, or else its scheme, leads to.
func (e *explainer) listeners() (found []*Listener, why string) {
	port := e.port
	if port == 0 {
		port = map[string]uint16{"http": 80, "https": 443, "grpc": 80}[e.url.Scheme]
	}
	for _, l := range e.s.Listeners {
		if e.q.Listener == l.Spec.Name || e.q.Listener == "" && (l.Spec.Address.Port() == port || l.Spec.ExternalPort == port && port != 0 && l.Spec.Protocol == e.url.Scheme) {
			found = append(found, l)
		}
	}
	switch {
	case len(found) > 0:
		return found, ""
	case e.q.Listener != "":
		return nil, fmt.Sprintf("there is no public listener %q", e.q.Listener)
	case e.port != 0:
		return nil, fmt.Sprintf("no public listener has port %d", e.port)
	}
	for _, l := range e.s.Listeners {
		if l.Spec.Protocol == e.url.Scheme || e.url.Scheme == "grpc" && IsHTTP(l.Spec.Protocol) {
			found = append(found, l)
		}
	}
	if len(found) > 0 {
		return found, fmt.Sprintf("no listener has port %d, so the listeners of scheme %s were asked", port, e.url.Scheme)
	}
	return nil, fmt.Sprintf("no public listener has port %d or scheme %s", port, e.url.Scheme)
}

func (e *explainer) onListener(l *Listener) {
	routes := e.s.Routes[l.Spec.Name]
	if IsHTTP(l.Spec.Protocol) {
		e.match(routes, l)
		return
	}
	if l.Target == nil {
		e.end(NoRoute, fmt.Sprintf("no route is bound to listener %s; its connections are closed", l.Spec.Name))
		return
	}
	e.take(l.Target)
}

// match walks the routes in the order in which Envoy matches them.
func (e *explainer) match(routes []*Route, l *Listener) {
	host := strings.ToLower(e.host())
	path := cmp.Or(e.url.EscapedPath(), "/")
	if e.out.Role == Gateway {
		path = e.path()
	}
	var v *VirtualHost
	for _, candidate := range VirtualHosts(routes) {
		if v == nil && hostCovers(candidate.Domain, host) {
			v = candidate
		}
	}
	for _, r := range routes {
		if v == nil || !slices.Contains(v.Routes, r) {
			e.out.Considered = append(e.out.Considered, Considered{r.Name, false, fmt.Sprintf("host %s is none of %s", host, strings.Join(r.hosts(), ", "))})
		}
	}
	if v == nil {
		e.miss(l, NoHost, fmt.Sprintf("no route has host %s", host))
		return
	}
	e.out.VirtualHost = text(v.Domain)
	query := parameters(e.url.RawQuery)
	for _, r := range v.Routes {
		reason := r.Match.mismatch(e.q, path, query)
		e.out.Considered = append(e.out.Considered, Considered{r.Name, reason == "", cmp.Or(reason, "everything it asks for is so")})
		if reason == "" {
			e.take(r)
			return
		}
	}
	e.miss(l, NoRoute, fmt.Sprintf("no route of host %s matches", v.Domain))
}

// host is the host that is asked for, without its port.
func (e *explainer) host() string {
	host := e.q.Headers["host"]
	if i := strings.LastIndexByte(host, ':'); i > 0 && !strings.HasSuffix(host, "]") {
		host = host[:i]
	}
	return host
}

// path is the path as a gateway matches it.
func (e *explainer) path() string { return normal(cmp.Or(e.url.RawPath, e.url.EscapedPath())) }

func (e *explainer) miss(l *Listener, outcome, why string) {
	if l == nil || l.RedirectsTo == nil {
		e.end(outcome, why)
		return
	}
	to := l.RedirectsTo.Spec
	at := "https://" + e.host()
	if port := cmp.Or(to.ExternalPort, to.Address.Port()); port != 443 {
		at += ":" + strconv.Itoa(int(port))
	}
	at += e.path()
	if e.url.RawQuery != "" || e.url.ForceQuery {
		at += "?" + e.url.RawQuery
	}
	e.out.Location = &at
	e.end(Redirected, fmt.Sprintf("%s; listener %s takes over by 308", why, to.Name))
}

// take follows a route to its clusters and endpoints.
func (e *explainer) take(r *Route) {
	e.out.Route, e.out.Origin = text(r.Name), text(r.Origin)
	known, serving := 0, 0
	for _, d := range r.To {
		e.out.To = append(e.out.To, WeightedTarget{d.Service.String(), d.Version, d.Weight, d.Cluster})
		e.out.Clusters = append(e.out.Clusters, d.Cluster)
		if e.out.Cluster == nil && d.Weight > 0 {
			e.out.Cluster = text(d.Cluster)
		}
		svc := e.s.Services.Get(d.Service)
		if svc == nil {
			continue
		}
		if e.out.Target == nil {
			e.out.Target = svc
		}
		if e.out.Policy == nil {
			e.out.Policy = text(cmp.Or(svc.Spec.Policy, "round_robin"))
		}
		states, up := svc.states(d)
		e.out.Endpoints = append(e.out.Endpoints, states...)
		if d.Weight > 0 {
			known, serving = known+len(states), serving+up
		}
	}
	switch {
	case serving > 0:
		e.step("endpoint", true, fmt.Sprintf("%d of %d instances take traffic", serving, known))
		e.end(Routed, "")
	case known == 0:
		e.step("endpoint", false, "the service has no instance")
		e.end(NoEndpoint, "the service has no running instance; its address and name stay")
	default:
		e.step("endpoint", false, fmt.Sprintf("none of %d instances takes traffic", known))
		e.end(NoHealthyEndpoint, "none of the service's instances takes traffic")
	}
}

// states are the endpoints of one destination, and how many take traffic.
func (s *Service) states(d Destination) (out []EndpointState, serving int) {
	index := slices.IndexFunc(s.Ports, func(p Port) bool { return p.Name == d.Port })
	for _, ep := range s.Endpoints {
		if d.Version != "" && ep.Instance.Version != d.Version {
			continue
		}
		i := ep.Instance
		state := EndpointState{ID: i.Name(), Cluster: d.Cluster, Node: i.Node, Version: i.Version, Weight: i.Weight, Health: string(i.Health), Origin: i.Origin, Serving: ep.Serving}
		switch {
		case index < 0 || !ep.At[index].IsValid():
			state.Serving, state.Reason = false, "it does not serve port "+d.Port
		case !i.Health.Serving():
			state.Reason = "its health is " + string(i.Health)
		case !ep.Serving:
			state.Reason = "it cannot be reached; see the problems"
		}
		if index >= 0 && ep.At[index].IsValid() {
			state.Address = text(ep.At[index].String())
		}
		if state.Serving {
			serving++
		}
		out = append(out, state)
	}
	return out, serving
}
