package admin

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/roostmesh/roost/cmd/internal/daemon"
	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
	"github.com/roostmesh/roost/xds"
	"github.com/roostmesh/roost/xds/envoy"
)

// The types of this file are the API's objects; absent values are null.

// List is what every list answers.
type List[T any] struct {
	Items []T `json:"items"`
}

// Service is a service.
type Service struct {
	Tenant      string      `json:"tenant"`
	Name        string      `json:"name"`
	Domain      string      `json:"domain"`
	Address     *string     `json:"address" doc:"null only while its pool is full"`
	Address6    *string     `json:"address6"`
	DedicatedIP *string     `json:"dedicated_ip"`
	Ports       []Port      `json:"ports"`
	Allow       []string    `json:"allow"`
	Instances   InstanceSum `json:"instances"`
	Origin      string      `json:"origin"`
	Generation  uint64      `json:"generation"`
}

// Port is a port of a service, as callers dial it.
type Port struct {
	Name     string `json:"name"`
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"`
}

// InstanceSum counts instances; healthy ones take traffic.
type InstanceSum struct {
	Total   int `json:"total"`
	Healthy int `json:"healthy"`
}

func serviceOf(s *lb.Service) Service {
	out := Service{Tenant: s.Key.Tenant, Name: s.Key.Service, Domain: s.Domain, Address: addr(s.Address), Address6: addr(s.Address6), DedicatedIP: addr(s.Dedicated),
		Ports: []Port{}, Allow: []string{}, Instances: InstanceSum{s.Total(), s.Healthy()}, Origin: s.Spec.Origin, Generation: s.Generation}
	for _, p := range s.Ports {
		out.Ports = append(out.Ports, Port{p.Name, p.Port, p.Protocol})
	}
	for _, g := range s.Spec.Allow {
		out.Allow = append(out.Allow, g.String())
	}
	return out
}

func addr(a netip.Addr) *string {
	if !a.IsValid() {
		return nil
	}
	s := a.String()
	return &s
}

// when is a time in UTC, nil where there is none.
func when(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

func optional(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

// Instance is an instance, as the sources know it.
type Instance struct {
	ID       string            `json:"id"`
	Tenant   string            `json:"tenant"`
	Service  string            `json:"service"`
	Address  string            `json:"address"`
	Ports    map[string]uint16 `json:"ports"`
	Node     *string           `json:"node"`
	Zone     *string           `json:"zone"`
	Version  *string           `json:"version"`
	Weight   uint32            `json:"weight"`
	Health   string            `json:"health"`
	Draining bool              `json:"draining"`
	Origin   string            `json:"origin"`
	Stale    bool              `json:"stale"`
	Held     bool              `json:"held" doc:"its source lost it in a way that proves nothing; it is kept while it answers"`
}

func instanceOf(i *discovery.Instance, svc *lb.Service) Instance {
	out := Instance{ID: i.ID, Tenant: i.Key.Tenant, Service: i.Key.Service, Address: i.Address.String(), Ports: map[string]uint16{}, Node: optional(i.Node), Zone: optional(i.Zone),
		Version: optional(i.Version), Weight: i.Weight, Health: string(i.Health), Draining: draining(i, svc), Origin: i.Origin, Stale: i.Stale, Held: i.Held}
	for n, p := range i.Ports {
		if n == 0 {
			out.Address = netip.AddrPortFrom(i.Address, p.Number).String()
		}
		name := p.Name
		if name == "" && svc != nil && len(svc.Ports) > 0 {
			name = svc.Ports[0].Name
		}
		out.Ports[name] = p.Number
	}
	return out
}

// draining says that an instance has been taken out of service on purpose.
func draining(i *discovery.Instance, svc *lb.Service) bool {
	if svc != nil { // its endpoints are ordered by id and node
		n, ok := slices.BinarySearchFunc(svc.Endpoints, i, func(e *lb.Endpoint, i *discovery.Instance) int {
			return cmp.Or(strings.Compare(e.Instance.ID, i.ID), strings.Compare(e.Instance.Node, i.Node))
		})
		if ok {
			return svc.Endpoints[n].Drain != lb.NotDraining
		}
	}
	return i.Health == discovery.Maintenance
}

// Route is a route in its place of the match order.
type Route struct {
	Name     string        `json:"name"`
	Tenant   string        `json:"tenant"`
	Listener string        `json:"listener"`
	Hosts    []string      `json:"hosts"`
	Match    Match         `json:"match"`
	To       []Destination `json:"to"`
	Order    int           `json:"order"`
	Origin   string        `json:"origin"`
}

// Match is what a request must be.
type Match struct {
	Path       *string      `json:"path"`
	PathPrefix *string      `json:"path_prefix"`
	PathRegex  *string      `json:"path_regex"`
	Methods    []string     `json:"methods"`
	Headers    []ValueMatch `json:"headers"`
	Query      []ValueMatch `json:"query"`
}

// ValueMatch compares a header or a query parameter.
type ValueMatch struct {
	Name   string  `json:"name"`
	Exact  *string `json:"exact"`
	Prefix *string `json:"prefix"`
	Regex  *string `json:"regex"`
	Invert bool    `json:"invert"`
}

// Destination is where a share of a route's requests goes.
type Destination struct {
	Service string  `json:"service"`
	Version *string `json:"version"`
	Weight  uint32  `json:"weight"`
	Cluster string  `json:"cluster"`
}

func routeOf(r *lb.Route, order int) Route {
	out := Route{Name: r.Name, Tenant: r.Tenant, Listener: r.Listener, Hosts: append([]string{}, r.Hosts...), To: []Destination{}, Order: order, Origin: r.Origin}
	m := r.Match
	out.Match = Match{Path: optional(m.Path), PathPrefix: optional(m.PathPrefix), PathRegex: optional(m.PathRegex), Methods: append([]string{}, m.Methods...), Headers: values(m.Headers), Query: values(m.Query)}
	for _, d := range r.To {
		service := d.Service.Service
		if d.Service.Tenant != r.Tenant {
			service = d.Service.String()
		}
		out.To = append(out.To, Destination{service, optional(d.Version), d.Weight, d.Cluster})
	}
	return out
}

func values(list []lb.ValueMatch) []ValueMatch {
	out := []ValueMatch{}
	for _, v := range list {
		out = append(out, ValueMatch{v.Name, optional(v.Exact), optional(v.Prefix), optional(v.Regex), v.Invert})
	}
	return out
}

// Listener is an address at which some proxies listen.
type Listener struct {
	Name      string  `json:"name"`
	ProxyRole string  `json:"proxy_role" doc:"sidecar and node proxies have a service's own listener; it is listed once, as node"`
	Gateway   *string `json:"gateway"`
	Tenant    *string `json:"tenant"`
	Service   *string `json:"service"`
	Address   string  `json:"address"`
	Protocol  string  `json:"protocol"`
	Origin    string  `json:"origin"`
}

// Address is a record of the ledger.
type Address struct {
	Address    string     `json:"address"`
	Kind       string     `json:"kind"`
	Pool       string     `json:"pool"`
	Tenant     string     `json:"tenant"`
	Service    string     `json:"service"`
	Generation uint64     `json:"generation"`
	State      string     `json:"state"`
	Since      time.Time  `json:"since"`
	Reason     string     `json:"reason"`
	Probed     bool       `json:"probed" doc:"not the first candidate of its hash: another host may have derived another one"`
	Holders    []string   `json:"holders" doc:"proxies that hold a listener on it"`
	FreeAfter  *time.Time `json:"free_after" doc:"earliest time; later while a holder has not let go. null: it is bound"`
}

func addressOf(r ledger.Record) Address {
	return Address{Address: r.Address.String(), Kind: r.Kind, Pool: r.Pool, Tenant: r.Owner.Tenant, Service: r.Owner.Service, Generation: r.Generation, State: r.State,
		Since: r.Since.UTC(), Reason: r.Reason, Probed: r.Probed, Holders: []string{}}
}

func usedAddress(u daemon.AddressUse) Address {
	out := addressOf(u.Record)
	if len(u.Holders) > 0 {
		out.Holders = u.Holders
	}
	out.FreeAfter = when(u.FreeAfter)
	return out
}

// Proxy is an Envoy.
type Proxy struct {
	ID           string               `json:"id"`
	Role         string               `json:"role"`
	Tenant       *string              `json:"tenant"`
	Service      *string              `json:"service"`
	EnvoyVersion string               `json:"envoy_version"`
	Connected    bool                 `json:"connected"`
	Since        time.Time            `json:"since"`
	Types        map[string]ProxyType `json:"types"`
	Replica      *string              `json:"replica" doc:"null: of this one"`
}

// ProxyType counts a proxy's resources of one type.
type ProxyType struct {
	Sent      int     `json:"sent"`
	Acked     int     `json:"acked"`
	Rejected  int     `json:"rejected"`
	LastError *string `json:"last_error"`
}

func proxyOf(p xds.ProxyStatus) Proxy {
	out := Proxy{ID: p.ID, Role: string(p.Identity.Role), Tenant: optional(p.Identity.Tenant), Service: optional(p.Identity.Service), EnvoyVersion: p.EnvoyVersion, Connected: p.Connected, Since: p.Since.UTC(), Types: map[string]ProxyType{}}
	for t := range envoy.Types {
		s := p.Types[t]
		if t == envoy.VirtualHost && s == (xds.TypeStatus{}) {
			continue // hardly any proxy asks for them
		}
		out.Types[t.String()] = ProxyType{s.Sent, s.Acked, s.Rejected, optional(s.LastError)}
	}
	return out
}

// Held is one resource of a proxy, intended against ACKed.
type Held struct {
	Type     string  `json:"type"`
	Name     string  `json:"name"`
	Intended *string `json:"intended" doc:"version that the proxy should have; null: none"`
	Pinned   *string `json:"pinned" doc:"version that several proxies refuse, and that the intended one, the last good one, is in the place of"`
	Sent     *string `json:"sent"`
	Acked    *string `json:"acked" doc:"version that the proxy has confirmed"`
	Rejected *string `json:"rejected"`
	Error    *string `json:"error"`
	Resource any     `json:"resource"`
}

// Tenant is who owns services.
type Tenant struct {
	Name      string   `json:"name"`
	Clients   []string `json:"clients"`
	Services  int      `json:"services"`
	Instances int      `json:"instances"`
}

// Problem is a mistake or a danger, with the way out.
type Problem struct {
	Code     string    `json:"code"`
	Severity string    `json:"severity"`
	Object   string    `json:"object"`
	Place    *string   `json:"place"`
	Message  string    `json:"message"`
	Fix      string    `json:"fix"`
	Since    time.Time `json:"since"`
	Replica  *string   `json:"replica" doc:"null: of this one"`
}

func problemOf(p lb.Problem) Problem {
	return Problem{p.Code, p.Severity, p.Object, optional(p.Place), p.Message, p.Fix, p.Since.UTC(), nil}
}

// Overview is Roost at a glance.
type Overview struct {
	Version   string            `json:"version"`
	Node      string            `json:"node"`
	Domain    string            `json:"domain"`
	Ready     bool              `json:"ready"`
	NotReady  []daemon.Waiting  `json:"not_ready"`
	Tenants   int               `json:"tenants"`
	Services  int               `json:"services"`
	Instances InstanceSum       `json:"instances"`
	Proxies   ProxySum          `json:"proxies"`
	Problems  map[string]int    `json:"problems" doc:"by severity"`
	Sources   []Source          `json:"sources"`
	Snapshot  uint64            `json:"snapshot"`
	Uptime    float64           `json:"uptime"`
	Listening map[string]string `json:"listening"`
}

// ProxySum counts proxies.
type ProxySum struct {
	Connected int `json:"connected"`
	Gone      int `json:"gone"`
	Rejecting int `json:"rejecting"`
}

// Source is a source of instances.
type Source struct {
	Name      string     `json:"name"`
	Ready     bool       `json:"ready"`
	Stale     bool       `json:"stale"`
	Since     *time.Time `json:"since"`
	LastError *string    `json:"last_error"`
	Held      int        `json:"held" doc:"instances kept although the source lost them"`
	HeldSince *time.Time `json:"held_since"`
	HeldWhy   *string    `json:"held_why"`
}

func sourceOf(s discovery.SourceStatus) Source {
	out := Source{Name: s.Name, Ready: s.Ready, Stale: s.Stale, LastError: optional(s.LastError), Held: s.Held, Since: when(s.Since), HeldSince: when(s.HeldSince), HeldWhy: optional(s.HeldWhy)}
	return out
}

// Certificate is a certificate of a public listener.
type Certificate struct {
	Names    []string   `json:"names"`
	CertFile string     `json:"cert_file"`
	NotAfter *time.Time `json:"not_after"`
	Issuer   *string    `json:"issuer"`
	Error    *string    `json:"error"`
	Origin   string     `json:"origin"`
}

// Explanation says why a request goes where it goes.
type Explanation struct {
	lb.Explanation
	Proxies []Carrier `json:"proxies"`
}

// Carrier is a proxy that carries the request, and whether it is up to date.
type Carrier struct {
	ID     string `json:"id"`
	State  string `json:"state" enum:"acked,pending,rejected,missing"`
	Detail string `json:"detail"`
}

func matches(filter, value string) bool { return filter == "" || cmp.Compare(filter, value) == 0 }
