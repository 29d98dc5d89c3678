package envoy

import (
	"cmp"
	"slices"
	"strings"
	"sync"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"
)

// RouteOf is the route of a virtual host, whose name is ROUTE/HOST, and the host:
// the Host header as a caller has sent it, maybe with a port. It is empty for a name
// that is no virtual host's.
//
// The first request of an Envoy names no virtual host, not even a route, and an empty
// answer does not end its wait: the route configuration that it starts with has to
// set an initial_fetch_timeout, 0.05s, or its listener warms for 15 s.
func RouteOf(virtualHost string) (route, host string) {
	i := strings.LastIndexByte(virtualHost, '/')
	if i < 0 {
		return virtualHost, ""
	}
	return virtualHost[:i], virtualHost[i+1:]
}

// Hosts finds the virtual hosts of one route configuration. It is decoded when the
// first one is asked for.
type Hosts struct {
	route  *Resource
	decode func() *hostTable
}

// hostTable is a route configuration by the domains of its virtual hosts. The
// patterns are without their star, the longest first.
type hostTable struct {
	exact    map[string]*routev3.VirtualHost
	suffixes []hostPattern // of *.example.com
	prefixes []hostPattern // of example.*
	any      *routev3.VirtualHost
}

type hostPattern struct {
	text string
	host *routev3.VirtualHost
}

// NewHosts is about the virtual hosts of a route configuration.
func NewHosts(route *Resource) *Hosts {
	return &Hosts{route, sync.OnceValue(func() *hostTable { return newHostTable(route) })}
}

func newHostTable(route *Resource) *hostTable {
	t := &hostTable{exact: map[string]*routev3.VirtualHost{}}
	m, err := route.Message()
	config, ok := m.(*routev3.RouteConfiguration)
	if err != nil || !ok {
		return t // it has no hosts
	}
	for _, v := range config.GetVirtualHosts() {
		for _, d := range v.GetDomains() {
			d = strings.ToLower(d)
			if d == "*" {
				t.any = v
			} else if suffix, ok := strings.CutPrefix(d, "*"); ok {
				t.suffixes = append(t.suffixes, hostPattern{suffix, v})
			} else if prefix, ok := strings.CutSuffix(d, "*"); ok {
				t.prefixes = append(t.prefixes, hostPattern{prefix, v})
			} else {
				t.exact[d] = v
			}
		}
	}
	longest := func(a, b hostPattern) int { return cmp.Compare(len(b.text), len(a.text)) }
	slices.SortStableFunc(t.suffixes, longest)
	slices.SortStableFunc(t.prefixes, longest)
	return t
}

// find is the virtual host that Envoy picks for a host without its port: the exact
// one, the one with the longest suffix, the longest prefix, or the one for all. A
// star stands for at least one character.
func (t *hostTable) find(host string) *routev3.VirtualHost {
	if v := t.exact[host]; v != nil {
		return v
	}
	for _, p := range t.suffixes {
		if len(host) > len(p.text) && strings.HasSuffix(host, p.text) {
			return p.host
		}
	}
	for _, p := range t.prefixes {
		if len(host) > len(p.text) && strings.HasPrefix(host, p.text) {
			return p.host
		}
	}
	return t.any
}

// Get is the virtual host of a name, for the asked host alone and under that name,
// or nil where there is none.
func (h *Hosts) Get(n Name) *Resource {
	_, host := RouteOf(n.Name)
	if host == "" {
		return nil
	}
	v := h.decode().find(strings.ToLower(withoutPort(host)))
	if v == nil {
		return nil
	}
	out := proto.CloneOf(v)
	out.Name, out.Domains = n.Name, []string{host}
	return encode(VirtualHost, n.Name, out, h.refs(out)...)
}

// refs are those of the route configuration that a virtual host has.
func (h *Hosts) refs(v *routev3.VirtualHost) (refs []Name) {
	named := map[string]bool{}
	for _, r := range v.GetRoutes() {
		named[r.GetRoute().GetCluster()] = true
		for _, c := range r.GetRoute().GetWeightedClusters().GetClusters() {
			named[c.GetName()] = true
		}
	}
	for _, n := range h.route.Refs {
		if n.Type == Cluster && named[n.Name] {
			refs = append(refs, n)
		}
	}
	return refs
}

// withoutPort cuts the port off a Host header.
func withoutPort(host string) string {
	i := strings.LastIndexByte(host, ':')
	if i < 0 || i == len(host)-1 || strings.Trim(host[i+1:], "0123456789") != "" {
		return host
	}
	if head := host[:i]; !strings.Contains(head, ":") || strings.HasSuffix(head, "]") {
		return head
	}
	return host // an IPv6 address without brackets
}

// hostsOf has the virtual hosts of each route configuration in a list, which is
// made on demand.
func hostsOf(list func() []*Resource) func() map[string]*Hosts {
	return sync.OnceValue(func() map[string]*Hosts {
		out := map[string]*Hosts{}
		for _, r := range list() {
			if r.Type == Route {
				out[r.Name.Name] = NewHosts(r)
			}
		}
		return out
	})
}

// host returns a virtual host of a route that the proxy may hold, or nil.
func (v *view) host(n Name) *Resource {
	route, _ := RouteOf(n.Name)
	if v.Get(Name{Route, route}) == nil {
		return nil
	}
	hosts := v.world.hosts(route)[route]
	if hosts == nil {
		return nil
	}
	return hosts.Get(n)
}

func (t *Translation) hosts(route string) map[string]*Hosts {
	if s := t.services.Get(serviceOf(route)); s != nil {
		return s.routes.hosts()
	}
	if p := t.public[route]; p != nil {
		return p.hosts()
	}
	return nil
}
