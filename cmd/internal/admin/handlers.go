package admin

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	mdns "github.com/miekg/dns"

	"github.com/roostmesh/roost/cmd/internal/events"
	"github.com/roostmesh/roost/dns"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

type body[T any] struct{ Body T }

// Filter keeps a list to a tenant or a service.
type Filter struct {
	Tenant  string `query:"tenant" doc:"only of this tenant"`
	Service string `query:"service" doc:"only of this service"`
}

func (f *Filter) takes(k lb.Key) bool {
	return matches(f.Tenant, k.Tenant) && matches(f.Service, k.Service)
}

// ServiceID names a service in a path.
type ServiceID struct {
	Tenant  string `path:"tenant"`
	Service string `path:"service"`
}

func (s ServiceID) key() lb.Key { return lb.Key{Tenant: s.Tenant, Service: s.Service} }

func list[T any](items []T) *body[List[T]] {
	if items == nil {
		items = []T{}
	}
	return &body[List[T]]{List[T]{items}}
}

// get registers a GET.
func get[I, O any](h huma.API, path, id, summary string, f func(context.Context, *I) (*O, error)) {
	huma.Register(h, huma.Operation{Method: http.MethodGet, Path: path, OperationID: id, Summary: summary}, f)
}

func (a *api) register(h huma.API) {
	get(h, "/healthz", "healthz", "The process lives", func(context.Context, *struct{}) (*body[map[string]bool], error) {
		return &body[map[string]bool]{map[string]bool{"ok": true}}, nil
	})
	get(h, "/readyz", "readyz", "Every source has answered once", a.readyz)
	get(h, "/version", "version", "What runs", func(context.Context, *struct{}) (*body[map[string]string], error) {
		return &body[map[string]string]{map[string]string{"version": a.version, "node": a.d.Config().Model.Node}}, nil
	})
	get(h, "/api/v1/overview", "overview", "Roost at a glance", a.overview)
	get(h, "/api/v1/tenants", "tenants", "Tenants", a.tenants)
	get(h, "/api/v1/services", "services", "Services", a.services)
	a.registerServices(h)
	a.registerDrains(h)
	a.registerTransfer(h)
	get(h, "/api/v1/instances", "instances", "Instances", a.instances)
	get(h, "/api/v1/routes", "routes", "Routes by listener and match order", a.routes)
	get(h, "/api/v1/listeners", "listeners", "Listeners", a.listeners)
	get(h, "/api/v1/addresses", "addresses", "The ledger", a.addresses)
	get(h, "/api/v1/explain", "explain", "Why a request goes where it goes", a.explain)
	get(h, "/api/v1/dns/resolve", "resolve", "What DNS answers to a caller", a.resolve)
	get(h, "/api/v1/proxies", "proxies", "Envoys", a.proxies)
	get(h, "/api/v1/proxies/{id}", "proxy", "One Envoy", a.proxy)
	get(h, "/api/v1/proxies/{id}/config", "proxy-config", "What an Envoy holds, intended against ACKed", a.proxyConfig)
	get(h, "/api/v1/problems", "problems", "What is wrong now", a.problems)
	get(h, "/api/v1/certificates", "certificates", "Certificates", a.certificates)
	get(h, eventsPath, "events", "What has changed; text/event-stream streams", a.events)
	huma.Register(h, huma.Operation{Method: http.MethodPost, Path: "/api/v1/discovery/release", OperationID: "release", Summary: "Let go of instances that are held although their source lost them"}, a.release)
}

func (a *api) overview(context.Context, *struct{}) (*body[Overview], error) {
	s, c := a.d.Snapshot(), a.d.Config()
	xdsAt, dnsAt := a.d.Sockets()
	waiting := a.d.NotReady()
	out := Overview{Version: a.version, Node: c.Model.Node, Domain: c.Model.Domain, Ready: len(waiting) == 0, NotReady: waiting, Tenants: len(s.Tenants()), Services: len(s.Order),
		Problems: map[string]int{"error": 0, "warning": 0, "info": 0}, Sources: []Source{}, Snapshot: s.Version, Uptime: time.Since(a.started).Seconds(),
		Listening: map[string]string{"xds": xdsAt, "dns": dnsAt}}
	for _, svc := range s.Order {
		out.Instances.Total += svc.Total()
		out.Instances.Healthy += svc.Healthy()
	}
	for _, p := range a.d.XDS.Proxies() {
		if p.Connected {
			out.Proxies.Connected++
		} else {
			out.Proxies.Gone++
		}
		if len(p.Rejected) > 0 {
			out.Proxies.Rejecting++
		}
	}
	for _, p := range a.d.Problems() {
		out.Problems[p.Severity]++
	}
	for _, src := range s.Catalog.Sources {
		out.Sources = append(out.Sources, sourceOf(src))
	}
	return &body[Overview]{out}, nil
}

func (a *api) tenants(context.Context, *struct{}) (*body[List[Tenant]], error) {
	s := a.d.Snapshot()
	byName := map[string]*Tenant{}
	for _, name := range s.Tenants() {
		byName[name] = &Tenant{Name: name, Clients: []string{}}
	}
	for _, t := range s.Config.Tenants {
		for _, c := range t.Clients {
			text := c.Prefix.String()
			if c.Node != "" {
				text += "@" + c.Node
			}
			byName[t.Name].Clients = append(byName[t.Name].Clients, text)
		}
	}
	for _, svc := range s.Order {
		byName[svc.Key.Tenant].Services++
		byName[svc.Key.Tenant].Instances += svc.Total()
	}
	var items []Tenant
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		items = append(items, *byName[name])
	}
	return list(items), nil
}

func (a *api) services(_ context.Context, f *Filter) (*body[List[Service]], error) {
	var items []Service
	for _, s := range a.d.Snapshot().Order {
		if f.takes(s.Key) {
			items = append(items, serviceOf(s))
		}
	}
	return list(items), nil
}

func (a *api) instances(_ context.Context, f *Filter) (*body[List[Instance]], error) {
	s := a.d.Snapshot()
	var items []Instance
	for _, key := range slices.SortedFunc(s.Catalog.Groups.Keys(), lb.Key.Compare) {
		if f.takes(key) {
			for _, i := range s.Catalog.Groups.Get(key).Instances {
				items = append(items, instanceOf(i, s.Services.Get(key)))
			}
		}
	}
	return list(items), nil
}

func (a *api) routes(_ context.Context, f *Filter) (*body[List[Route]], error) {
	s := a.d.Snapshot()
	var items []Route
	add := func(r *lb.Route, order int) {
		target := len(r.To) == 0 || f.Service == ""
		for _, d := range r.To {
			target = target || d.Service.Service == f.Service
		}
		if target && matches(f.Tenant, r.Tenant) {
			items = append(items, routeOf(r, order))
		}
	}
	for _, l := range s.Listeners {
		for _, r := range s.Routes[l.Spec.Name] {
			add(r, r.Order)
		}
	}
	for _, svc := range s.Order {
		for i := range svc.Ports {
			for n, r := range s.PortRoutes(svc, &svc.Ports[i]) {
				add(r, n+1)
			}
		}
	}
	slices.SortStableFunc(items, func(x, y Route) int { return strings.Compare(x.Listener, y.Listener) })
	return list(items), nil
}

func (a *api) listeners(_ context.Context, f *Filter) (*body[List[Listener]], error) {
	s := a.d.Snapshot()
	var items []Listener
	if f.Service == "" && f.Tenant == "" {
		for _, l := range s.Listeners {
			items = append(items, Listener{Name: l.Spec.Name, ProxyRole: string(lb.Gateway), Gateway: optional(l.Spec.Gateway), Address: l.Spec.Address.String(), Protocol: l.Spec.Protocol, Origin: l.Spec.Origin})
		}
	}
	for _, svc := range s.Order {
		if !f.takes(svc.Key) {
			continue
		}
		for _, p := range svc.Ports {
			l := Listener{Name: lb.RouteNameOf(svc.Key, p.Port), ProxyRole: string(lb.Node), Tenant: optional(svc.Key.Tenant), Service: optional(svc.Key.Service), Protocol: p.Protocol, Origin: svc.Spec.Origin}
			if svc.Address.IsValid() {
				l.Address = netip.AddrPortFrom(svc.Address, p.Port).String()
				items = append(items, l)
			}
			if svc.Dedicated.IsValid() {
				l.Name, l.ProxyRole, l.Address = l.Name+"@dedicated", string(lb.Gateway), netip.AddrPortFrom(svc.Dedicated, p.Port).String()
				items = append(items, l)
			}
		}
	}
	slices.SortStableFunc(items, func(x, y Listener) int { return strings.Compare(x.Name, y.Name) })
	return list(items), nil
}

func (a *api) addresses(_ context.Context, f *Filter) (*body[List[Address]], error) {
	var items []Address
	for _, u := range a.d.Addresses() {
		if f.takes(lb.Key{Tenant: u.Owner.Tenant, Service: u.Owner.Service}) {
			items = append(items, usedAddress(u))
		}
	}
	return list(items), nil
}

type resolveInput struct {
	Name string `query:"name" required:"true"`
	Type string `query:"type" default:"A"`
	From string `query:"from" doc:"ADDRESS or ADDRESS@NODE of the caller; default 127.0.0.1"`
}

func (a *api) resolve(ctx context.Context, in *resolveInput) (*body[dns.Answer], error) {
	qtype, ok := mdns.StringToType[strings.ToUpper(in.Type)]
	if !ok {
		return nil, huma.Error400BadRequest("type " + in.Type + " is no DNS type")
	}
	from := in.From
	if from == "" {
		from = "127.0.0.1"
	}
	text, node, elsewhere := strings.Cut(from, "@")
	at, err := netip.ParseAddr(text)
	if err != nil {
		return nil, huma.Error400BadRequest("from " + in.From + " is neither ADDRESS nor ADDRESS@NODE")
	}
	if s := a.d.Snapshot(); elsewhere {
		return &body[dns.Answer]{dns.Resolve(s, s.Callers.Who(node, at), in.Name, qtype)}, nil
	}
	return &body[dns.Answer]{a.d.DNS.Resolve(ctx, at, in.Name, qtype)}, nil
}

type everywhereFilter struct {
	Filter
	Everywhere
}

func (a *api) proxies(ctx context.Context, f *everywhereFilter) (*body[List[Proxy]], error) {
	return list(slices.DeleteFunc(a.allProxies(ctx, f.Everywhere), func(p Proxy) bool {
		return !matches(f.Tenant, value(p.Tenant)) || !matches(f.Service, value(p.Service))
	})), nil
}

// ProxyID names a proxy in a path.
type ProxyID struct {
	ID string `path:"id"`
}

func (a *api) proxy(ctx context.Context, in *ProxyID) (*body[Proxy], error) {
	if p, ok := a.d.XDS.Proxy(unescape(in.ID)); ok && p.Connected {
		return &body[Proxy]{proxyOf(p)}, nil // nobody else has to be asked
	}
	all := a.allProxies(ctx, Everywhere{})
	n := slices.IndexFunc(all, func(p Proxy) bool { return p.ID == unescape(in.ID) })
	if n < 0 {
		return nil, huma.Error404NotFound("no proxy " + in.ID + " is connected or was in the last hour")
	}
	return &body[Proxy]{all[n]}, nil
}

// unescape undoes one level of percent encoding where the router left it.
func unescape(s string) string {
	if out, err := url.PathUnescape(s); err == nil && strings.Contains(s, "%2F") {
		return out
	}
	return s
}

type configInput struct {
	ProxyID
	Type string `query:"type" doc:"cluster endpoint listener route secret extension virtual_host; default all"`
}

func (a *api) proxyConfig(_ context.Context, in *configInput) (*body[List[Held]], error) {
	types := []envoy.Type{envoy.Cluster, envoy.Endpoint, envoy.Listener, envoy.Route, envoy.Secret, envoy.Extension, envoy.VirtualHost}
	if in.Type != "" {
		t, ok := envoy.TypeNamed(in.Type)
		if !ok {
			return nil, huma.Error400BadRequest("type " + in.Type + " is none of cluster, endpoint, listener, route, secret, extension, virtual_host")
		}
		types = []envoy.Type{t}
	}
	var items []Held
	for _, t := range types {
		held, ok := a.d.XDS.Holding(unescape(in.ID), t)
		if !ok {
			return nil, huma.Error404NotFound("no proxy " + in.ID + " is connected or was in the last hour")
		}
		for _, r := range held {
			out := Held{Type: t.String(), Name: r.Name, Intended: optional(r.Intended), Sent: optional(r.Sent), Acked: optional(r.Acked), Rejected: optional(r.Rejected), Error: optional(r.Error)}
			if r.Resource != nil && r.Intended != "" {
				out.Pinned = optional(r.Resource.InPlaceOf)
			}
			if r.Resource != nil && t != envoy.Secret {
				if data, err := r.Resource.JSON(); err == nil {
					out.Resource = json.RawMessage(data)
				}
			}
			items = append(items, out)
		}
	}
	return list(items), nil
}

func (a *api) problems(ctx context.Context, f *everywhereFilter) (*body[List[Problem]], error) {
	return list(slices.DeleteFunc(a.allProblems(ctx, f.Everywhere), func(p Problem) bool {
		tenant, rest, _ := strings.Cut(p.Object, "/")
		service, _, _ := strings.Cut(rest, "/")
		return !matches(f.Tenant, tenant) || !matches(f.Service, service)
	})), nil
}

func (a *api) certificates(context.Context, *struct{}) (*body[List[Certificate]], error) {
	return list(certificates(a.d)), nil
}

type eventsInput struct {
	Filter
	Everywhere
	After uint64 `query:"after" doc:"events after this sequence number"`
	Limit int    `query:"limit" default:"1000" minimum:"1" maximum:"10000"`
}

func (a *api) events(ctx context.Context, in *eventsInput) (*body[List[ReplicaEvent]], error) {
	takes := func(e events.Event) bool {
		return e.Seq > in.After && matches(in.Tenant, value(e.Tenant)) && matches(in.Service, value(e.Service))
	}
	items := mergeEvents(a.d.Events.List(in.After, in.Limit, takes), a.others(ctx, in.Everywhere), takes)
	if more := len(items) - in.Limit; more > 0 && in.After == 0 {
		items = items[more:]
	}
	return list(items[:min(len(items), in.Limit)]), nil
}

func value(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

func (a *api) release(ctx context.Context, in *struct {
	Source string `query:"source" doc:"only of this source"`
}) (*struct{}, error) {
	if err := a.d.Release(ctx, in.Source); err != nil {
		return nil, huma.Error503ServiceUnavailable(err.Error())
	}
	return nil, nil
}
