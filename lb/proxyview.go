package lb

// Sight is which services a proxy may hold, by who it is.
type Sight struct {
	role     Role
	tenants  map[string]bool // whose callers it serves
	services map[Key]bool    // whose instances it stands beside
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
		v.tenants = map[string]bool{id.Tenant: true}
		v.services = map[Key]bool{{Tenant: id.Tenant, Service: id.Service}: true}
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
	if v.all || v.tenants[s.Key.Tenant] {
		return true
	}
	for _, g := range s.Spec.Allow {
		if g.Service == "" && v.tenants[g.Tenant] || v.services[Key{Tenant: g.Tenant, Service: g.Service}] {
			return true
		}
	}
	return false
}

// SameOn tells whether both say the same of who is who on a node.
func (c *Callers) SameOn(o *Callers, node string) bool {
	return c == o || o != nil && c.shared == o.shared && c.byNode[node] == o.byNode[node] && c.nodes[node] == o.nodes[node] && c.loopback == o.loopback
}

// ChangedNodes lists the nodes on which c and o differ; all says every node.
func (c *Callers) ChangedNodes(o *Callers) (nodes []string, all bool) {
	if c == o {
		return nil, false
	}
	if o == nil || c.shared != o.shared || c.loopback != o.loopback {
		return nil, true
	}
	for name, n := range c.nodes {
		if o.nodes[name] != n {
			nodes = append(nodes, name)
		}
	}
	for name := range o.nodes {
		if c.nodes[name] == nil {
			nodes = append(nodes, name)
		}
	}
	return nodes, false
}
