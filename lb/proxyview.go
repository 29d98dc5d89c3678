package lb

import "slices"

// Sight is which services a proxy may hold, by who it is.
type Sight struct {
	role     Role
	tenant   string          // of a sidecar or a gRPC client
	service  Key             // that it stands beside
	tenants  map[string]bool // whose callers a node proxy serves
	services map[Key]bool    // whose instances are on its host
	all      bool
	gateway  map[Key]bool // what a gateway's routes go to
}

// SightOf says what a proxy may hold in s: a sidecar or a gRPC client what its service may call,
// a node proxy what any caller on its host may call, a gateway what its public
// routes and the dedicated IPs go to.
func (s *Snapshot) SightOf(id Identity) Sight {
	v := Sight{role: id.Role}
	switch id.Role {
	case Sidecar, Proxyless:
		v.tenant, v.service = id.Tenant, Key{Tenant: id.Tenant, Service: id.Service}
	case Node:
		tenants, all := s.Callers.Tenants(id.Node)
		v.all, v.tenants, v.services = all, map[string]bool{}, s.Callers.Services(id.Node)
		for _, t := range tenants {
			v.tenants[t] = true
		}
	case Gateway:
		v.gateway = s.gatewayServices(id.Group)
	}
	return v
}

// gatewayServices are the services behind the public listeners of a group.
func (s *Snapshot) gatewayServices(group string) map[Key]bool {
	out := map[Key]bool{}
	for _, l := range s.Listeners {
		if l.Spec.Gateway != group {
			continue
		}
		for _, r := range s.Routes[l.Spec.Name] {
			for _, d := range r.To {
				out[d.Service] = true
			}
		}
	}
	return out
}

// Sees tells whether the proxy may hold the service's clusters; a node or
// sidecar then has its listeners, too.
func (v Sight) Sees(s *Service) bool {
	if v.role == Gateway {
		return v.gateway[s.Key] || s.Dedicated.IsValid()
	}
	if v.all || v.serves(s.Key.Tenant) {
		return true
	}
	for _, g := range s.Spec.Allow {
		if g.Service == "" && v.serves(g.Tenant) {
			return true
		}
		if k := (Key{Tenant: g.Tenant, Service: g.Service}); v.beside() && v.service == k || v.services[k] {
			return true
		}
	}
	return false
}

func (v Sight) beside() bool { return v.role == Sidecar || v.role == Proxyless }

func (v Sight) serves(tenant string) bool {
	if v.beside() {
		return v.tenant == tenant
	}
	return v.tenants[tenant]
}

// SameOn tells whether both say the same of who is who on a node.
func (c *Callers) SameOn(o *Callers, node string) bool {
	return c == o || o != nil && c.shared == o.shared && c.byNode[node] == o.byNode[node] && c.nodes.Get(node) == o.nodes.Get(node) && c.loopback == o.loopback
}

// ChangedNodes lists the nodes on which c and o differ; all says every node.
func (c *Callers) ChangedNodes(o *Callers) (nodes []string, all bool) {
	if c == o {
		return nil, false
	}
	if o == nil || c.shared != o.shared || c.loopback != o.loopback {
		return nil, true
	}
	return slices.Sorted(c.nodes.Differs(o.nodes)), false
}
