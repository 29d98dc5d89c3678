package admin

import (
	"context"
	"net/netip"
	"slices"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/roostmesh/roost/cmd/internal/daemon"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// maxCarriers bounds how many proxies an explanation lists.
const maxCarriers = 50

type explainInput struct {
	URL      string   `query:"url" required:"true" doc:"http://HOST/PATH, https://..., tcp://HOST:PORT"`
	Method   string   `query:"method" default:"GET"`
	Header   []string `query:"header,explode" doc:"NAME:VALUE, may be repeated"`
	From     string   `query:"from" doc:"TENANT/SERVICE, or ADDRESS or ADDRESS@NODE of the caller"`
	Proxy    string   `query:"proxy" doc:"as this proxy sees it"`
	Listener string   `query:"listener" doc:"at this public listener"`
}

func (a *api) explain(_ context.Context, in *explainInput) (*body[Explanation], error) {
	s := a.d.Snapshot()
	q := lb.Question{URL: in.URL, Method: in.Method, Headers: map[string]string{}, Listener: in.Listener}
	for _, h := range in.Header {
		name, value, ok := strings.Cut(h, ":")
		if !ok {
			return nil, huma.Error400BadRequest("header " + h + " is not NAME:VALUE")
		}
		q.Headers[strings.ToLower(strings.TrimSpace(name))] = strings.TrimSpace(value)
	}
	q.From = caller(s, in.From)
	var err error
	if in.Proxy != "" && q.From == nil {
		if q.From, err = asProxy(in.Proxy); err != nil {
			return nil, huma.Error400BadRequest(err.Error())
		}
	}
	e, err := s.Explain(q)
	if err != nil {
		return nil, huma.Error400BadRequest(err.Error())
	}
	out := Explanation{Explanation: *e, Proxies: []Carrier{}}
	out.Proxies = append(out.Proxies, carriers(a.d, s, e, in.Proxy)...)
	acked(&out)
	return &body[Explanation]{out}, nil
}

// caller reads who asks; "" is the operator.
func caller(s *lb.Snapshot, from string) *lb.View {
	if from == "" {
		return nil
	}
	text, node, elsewhere := strings.Cut(from, "@")
	if at, err := netip.ParseAddr(text); err == nil {
		if !elsewhere {
			node = s.Config.Node
		}
		v := s.Callers.Who(node, at)
		return &v
	}
	tenant, service, _ := strings.Cut(from, "/")
	return &lb.View{Kind: lb.ViewTenant, Tenant: tenant, Service: service, Why: "asked for by name"}
}

// asProxy is the view of a sidecar or a gRPC client; other proxies carry several
// callers'.
func asProxy(id string) (*lb.View, error) {
	identity, err := lb.ParseIdentity(id)
	if err != nil || !identity.Beside() {
		return nil, err
	}
	who := "sidecar "
	if identity.Role == lb.Proxyless {
		who = "gRPC client "
	}
	return &lb.View{Kind: lb.ViewTenant, Tenant: identity.Tenant, Service: identity.Service, Why: who + id}, nil
}

// carriers are the connected proxies that would carry the request, with what
// they have confirmed of it.
func carriers(d *daemon.Daemon, s *lb.Snapshot, e *lb.Explanation, only string) []Carrier {
	if e.Target == nil && e.Listener == nil {
		return nil
	}
	var out []Carrier
	for _, p := range d.XDS.Proxies() {
		if !p.Connected || only != "" && p.ID != only || len(out) == maxCarriers {
			continue
		}
		id := p.Identity
		gateway := e.Role == lb.Gateway
		if gateway != (id.Role == lb.Gateway) || gateway && e.Group != "" && id.Group != e.Group {
			continue
		}
		if !gateway && (e.Target == nil || !s.SightOf(id).Sees(e.Target)) {
			continue
		}
		// A gRPC client asks for the services that it calls and no others.
		if id.Role == lb.Proxyless && only == "" {
			continue
		}
		out = append(out, state(d, p.ID, id.Role, e))
	}
	return out
}

// state says whether a proxy has confirmed the listener and the endpoints.
func state(d *daemon.Daemon, id string, role lb.Role, e *lb.Explanation) Carrier {
	c := Carrier{ID: id, State: "acked", Detail: "it has confirmed the listener and the endpoints"}
	check := func(t envoy.Type, name string) {
		held, _ := d.XDS.Holding(id, t)
		for _, h := range held {
			if h.Name != name {
				continue
			}
			switch {
			case h.Rejected != "":
				c.State, c.Detail = "rejected", t.String()+" "+name+": "+h.Error
			case h.Acked != h.Intended && c.State != "rejected":
				c.State, c.Detail = "pending", t.String()+" "+name+" is on its way"
			}
			return
		}
		if c.State == "acked" {
			c.State, c.Detail = "missing", "it has no "+t.String()+" "+name
		}
	}
	if e.Listener != nil {
		first := envoy.Listener
		if role == lb.Proxyless { // its listeners are named as it dials, its routes as everybody's
			first = envoy.Route
		}
		check(first, *e.Listener)
	}
	for _, cluster := range slices.Compact(slices.Sorted(slices.Values(e.Clusters))) {
		check(envoy.Endpoint, cluster)
	}
	return c
}

// acked adds the last step of a request inside the mesh: whether the proxies
// have what the answer is based on.
func acked(e *Explanation) {
	if len(e.Steps) == 0 || e.Outcome == lb.Denied {
		return
	}
	step := lb.Step{Name: "ack", OK: true, Detail: "every proxy that carries it is up to date"}
	if len(e.Proxies) == 0 {
		step = lb.Step{Name: "ack", OK: false, Detail: "no proxy that would carry it is connected"}
	}
	for _, p := range e.Proxies {
		if p.State != "acked" {
			step = lb.Step{Name: "ack", OK: false, Detail: p.ID + ": " + p.Detail}
		}
	}
	e.Steps = append(e.Steps, step)
}
